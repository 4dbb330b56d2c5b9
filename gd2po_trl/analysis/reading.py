"""Reads logged rollouts: which columns hold rewards, and their values.

Texts are hashed as they are read and not kept, so that memory grows with the number of rollouts and not with their
length. `read_texts` fetches the few texts that a report shows.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .. import run_log
from ..errors import UsageError
from ..messages import conversation_text
from .formats import (
    CSV_SUFFIXES,
    JSON_SUFFIXES,
    Layout,
    find_files,
    find_layout,
    is_trl_table,
    read_chunks,
    require,
    step_in_name,
)
from .weights import exact_weights, logged_rewards


# Numeric columns that are not rewards. A numeric column that a reward function logs by `log_extra` looks like a
# reward; the run's `trainer_state.json`, where there is one, tells them apart.
NOT_A_REWARD = re.compile(
    r"gd2po_.*|steps?|global_steps?|gen_step|epoch|iteration|advantages?|__index_level_\d+__|unnamed: \d+|index|idx|id"
    r"|uid|.*_(id|idx|index)|rank|seed|timestamp|time|loss|entropy|kl|temperature|num_turns|num_tokens"
    r"|(num_)?(input|output|prompt|completion|response|generation|token)s?_(len|lengths?|tokens?|count)"
    r"|(is_)?truncated|.*mask|baseline|.*logps?|.*logprobs?",
    re.IGNORECASE,
)
# A file without types holds answers and rewards alike as text; these are answers.
AN_ANSWER = re.compile(
    r".*(answer|solution|gold|target|label|ground_?truth|reference|expected|pred(iction)?|parsed)s?|gts?",
    re.IGNORECASE,
)
# Columns that hold the total of the others, if it fits, or if there is no doubt about the name.
PERHAPS_A_TOTAL = re.compile(r"(.*_)?(rewards?|scores?|sum|total|return)", re.IGNORECASE)
SURELY_A_TOTAL = re.compile(
    r"(total|sum|overall|combined|final)(_(rewards?|scores?))?|rewards?_(total|sum)", re.IGNORECASE
)
# Text that stands for "no value".
NO_VALUE = ("", "none", "null", "na", "n/a", "#n/a", "nan", "-", "--", "missing")
TRUTH = {"true": 1.0, "false": 0.0}


@dataclass
class Rollouts:
    """
    N logged rollouts under K rewards, in the order of the files. Texts are represented by a 64-bit hash.

    Args:
        reward_names (`list[str]`): Names of the rewards.
        rewards (`np.ndarray` of shape `(N, K)`, float64): NaN where a reward function did not score the rollout.
        step (`np.ndarray` of shape `(N,)`, int64): Training step; 0 throughout where the files tell none.
        prompt, completion (`np.ndarray` of shape `(N,)`, uint64): Hashes of the texts.
        length (`np.ndarray` of shape `(N,)`, int64): Characters of the completions.
        run (`np.ndarray` of shape `(N,)`, int64): Which run (folder) the rollout is from. Empty, as the following, for
            rollouts in memory.
        file, row (`np.ndarray` of shape `(N,)`, int64): Where its texts are.
        extra (`dict[str, np.ndarray]`): `advantage` and `gd2po_conflict`, where the first file has them, and `total`,
            the total reward of a file that has a column of it; float64, shape `(N,)`, NaN if missing.
        files (`list[Path]`), layout ([`Layout`]): The files, and where they keep what.
        warnings, notes (`list[str]`): What may make the figures wrong, and what a reader of them has to know.
    """

    reward_names: list[str]
    rewards: np.ndarray
    step: np.ndarray
    prompt: np.ndarray
    completion: np.ndarray
    length: np.ndarray
    run: np.ndarray = field(default_factory=lambda: np.zeros(0))
    file: np.ndarray = field(default_factory=lambda: np.zeros(0))
    row: np.ndarray = field(default_factory=lambda: np.zeros(0))
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def has_step(self) -> bool:
        """Whether the files tell the training step."""
        return self.layout.step is not None or self.layout.step_in_name


def read_rollouts(sources: Sequence[str | Path], reward_names: Sequence[str] | None = None) -> Rollouts:
    """
    Read the rollouts of runs or files.

    `sources` are output folders of runs, folders with files, or parquet, JSONL or CSV files: completions that TRL
    logged, rollouts as ms-swift, verl or NeMo-RL dump them, or files with the columns `prompt`, `completion`, one per
    reward and, where there are several steps, `step`. Without `reward_names`, the rewards are the columns that the
    run's `trainer_state.json` names, or else all columns of numbers or booleans but for steps, advantages,
    identifiers, totals and diagnostics.

    Raises:
        [`UsageError`]: if a file cannot be read, or lacks a column or a prompt; it says which, and what to do.
    """
    files = find_files(sources)
    warnings: list[str] = []
    notes: list[str] = []
    first = None
    while first is None:
        first = next((chunk for chunk in read_chunks(files[0]) if len(chunk)), None)
        if first is None:
            if len(files) == 1:
                raise UsageError(f"'{files[0]}' holds no rows.")
            notes.append(f"'{files.pop(0)}' holds no rows.")
    layout = find_layout(first.columns, files)
    total = None
    if reward_names:
        names = list(dict.fromkeys(reward_names))
        require(first, files[0], names)
        if texts := [name for name in names if name in (*layout.texts, layout.step)]:
            raise UsageError(f"--rewards names `{texts[0]}`, a column that holds texts or steps and no rewards.")
    else:
        names, total = _detect_rewards(first, files[0], layout, warnings, notes)
    named = [name for name in ("advantage", "gd2po_conflict", total) if name is not None]
    extras = [name for name in named if name in first.columns and name not in names]
    folders = list(dict.fromkeys(file.parent.resolve() for file in files))
    # A first file without a step must not be followed by files that have one.
    stray_step = [] if layout.step or layout.step_in_name else ["step"]
    columns = [*layout.texts, *([layout.step] if layout.step else stray_step), *names, *extras]
    parts: list[pd.DataFrame] = []
    replaced: dict[str, list[str]] = {}
    for index, file in enumerate(files):
        # A JSON object may leave out what is null: a reward that did not score the rollout.
        optional = [*extras, *stray_step, *(names if file.suffix.lower() in JSON_SUFFIXES else [])]
        row = 0
        for chunk in read_chunks(file, columns, optional):
            if stray_step and chunk["step"].notna().any():
                raise UsageError(
                    f"'{file}' has a column `step` and '{files[0]}' has none; analyze them one after another."
                )
            part = _values(chunk, file, layout, [*names, *extras], row, replaced)
            part["file"], part["run"] = index, folders.index(file.parent.resolve())
            part["row"] = np.arange(row, row + len(chunk))
            row += len(chunk)
            parts.append(part)
    for name, cells in replaced.items():
        shown = ", ".join(map(repr, dict.fromkeys(cells)))
        warnings.append(f"{len(cells):,} values of {name} are {shown[:80]}: these rollouts count as not scored by it.")

    joined = pd.concat(parts, ignore_index=True)
    rewards = joined[[f"reward {name}" for name in names]].to_numpy()
    names, rewards = _usable(names, rewards, notes)
    if len(folders) > 1:
        notes.append(f"Rollouts of {len(folders)} folders are pooled; groups are formed within a folder.")
    if stray_step:
        notes.append("There is no column `step`: all rows count as one step, so nothing is said about change.")
    if any(map(is_trl_table, files)):
        notes.append(
            "TRL's table holds the latest generation batch of each logging step. An evaluation replaces the table of "
            "its step, and nothing in the file tells its rollouts from training ones."
        )
    return Rollouts(
        reward_names=names,
        rewards=rewards,
        **{name: joined[name].to_numpy() for name in ("step", "prompt", "completion", "length", "run", "file", "row")},
        extra={"total" if name == total else name: joined[f"reward {name}"].to_numpy() for name in extras},
        files=files,
        layout=layout,
        warnings=warnings,
        notes=notes,
    )


def _usable(names: list[str], rewards: np.ndarray, notes: list[str]) -> tuple[list[str], np.ndarray]:
    """The rewards with values; an infinite one is an error."""
    # Training has float32, in which these are infinite.
    infinite = (np.abs(rewards) > np.finfo(np.float32).max).sum(0)
    if infinite.any():
        culprit = int(infinite.argmax())
        raise UsageError(
            f"The reward column '{names[culprit]}' holds {infinite[culprit]} infinite values. Replace them by finite "
            "numbers, or leave them empty (not scored)."
        )
    scored = (~np.isnan(rewards)).any(0)
    if not scored.any():
        raise UsageError("No rollout has a reward: every reward column is empty.")
    if not scored.all():
        empty = [name for name, has_value in zip(names, scored, strict=True) if not has_value]
        notes.append(f"No rollout has a value of {', '.join(empty)}: left out.")
    return [name for name, has_value in zip(names, scored, strict=True) if has_value], rewards[:, scored]


def read_texts(rollouts: Rollouts, indices: Sequence[int]) -> list[tuple[str, str]]:
    """Prompt and completion of the rollouts at `indices`, as plain text, read from their files again."""
    layout = rollouts.layout
    texts: dict[tuple[int, int], tuple[str, str]] = {}
    places = [(int(rollouts.file[index]), int(rollouts.row[index])) for index in indices]
    for file in {file for file, _ in places}:
        rows, start = [row for other, row in places if other == file], 0
        for chunk in read_chunks(rollouts.files[file], layout.texts):
            for row in rows:
                if start <= row < start + len(chunk):
                    record = chunk.iloc[row - start]
                    prompt = "" if layout.prompt is None else conversation_text(record[layout.prompt])
                    texts[file, row] = (prompt, conversation_text(record[layout.completion]))
            start += len(chunk)
            if start > max(rows):
                break
    return [texts[place] for place in places]


# Which columns are rewards


def _detect_rewards(
    chunk: pd.DataFrame, file: Path, layout: Layout, warnings: list[str], notes: list[str]
) -> tuple[list[str], str | None]:
    """The names of the reward columns, and of the column that holds their total, if there is one."""
    logged = run_log.reward_names(logged_rewards(file))
    names = [str(name) for name in chunk.columns if name in logged]
    if names:
        return names, None
    is_typed = file.suffix.lower() not in CSV_SUFFIXES
    others = []
    for name in map(str, chunk.columns):
        is_answer = not is_typed and AN_ANSWER.fullmatch(name)
        if name in (*layout.texts, layout.step) or NOT_A_REWARD.fullmatch(name) or is_answer:
            continue
        values, strays = _to_numbers(chunk[name], text_counts=not is_typed)
        found = len(values) if _is_numeric(chunk[name]) else int((~np.isnan(values)).sum())
        if found and not strays:
            names.append(name)
            continue
        others.append(name)
        if found >= len(strays) > 0:
            warnings.append(
                f"{name} is not taken as a reward: {found / (found + len(strays)):.0%} of its values are numbers, and "
                f"one is {str(chunk[name].iloc[strays[0]])[:40]!r}. Correct it, or leave the cell empty where the "
                "rollout was not scored."
            )
    total = _total(chunk, names, layout)
    if total is not None:
        names.remove(total)
    if not names:
        raise UsageError(
            f"'{file}' has no reward column: of its columns ({', '.join(map(str, chunk.columns))}) none that may hold "
            "a reward holds numbers. A column of digits as text counts as text; name it with --rewards if it is one."
        )
    notes.append(
        f"Taken as rewards, being columns of numbers: {', '.join(names)}."
        + (f" The total: {total}." if total else "")
        + (f" Not: {', '.join(others)}." if others else "")
        + " --rewards names others."
    )
    return names, total


def _total(chunk: pd.DataFrame, names: list[str], layout: Layout) -> str | None:
    """The column among `names` that is the total of the others."""
    if len(names) < 2:
        return None
    for name in layout.totals:
        if name in names:
            return name
    for name in names:
        if PERHAPS_A_TOTAL.fullmatch(name):
            parts = [_to_numbers(chunk[other])[0] for other in names if other != name]
            weights = exact_weights(np.stack(parts, axis=1), _to_numbers(chunk[name])[0])
            if SURELY_A_TOTAL.fullmatch(name) or (len(parts) > 1 and weights is not None):
                return name
    return None


# Values


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column.dtype)


def _to_numbers(column: pd.Series, *, text_counts: bool = True) -> tuple[np.ndarray, list[int]]:
    """
    `column` as float64, NaN for null and text that stands for it, and the rows with neither a number nor null. Whether
    text that reads as a number is one, `text_counts` says.
    """
    if _is_numeric(column):
        return column.to_numpy(dtype=np.float64, na_value=np.nan), []
    values, strays = np.full(len(column), np.nan), []
    for row, value in enumerate(column):
        text = value.strip().lower() if isinstance(value, str) else None
        if value is None or value is pd.NA or value is pd.NaT or text in NO_VALUE:
            continue
        try:
            if text is not None and not text_counts:
                raise ValueError
            values[row] = TRUTH[text] if text in TRUTH else float(value)
        except (TypeError, ValueError, OverflowError):
            strays.append(row)
    return values, strays


def _checked_numbers(chunk: pd.DataFrame, name: str, file: Path, start: int) -> np.ndarray:
    values, strays = _to_numbers(chunk[name])
    if strays:
        raise UsageError(
            f"'{file}', row {start + strays[0] + 1}: `{name}` is {str(chunk[name].iloc[strays[0]])[:40]!r}; the "
            f"column `{name}` is not numeric. Correct the value, leave it empty if the rollout was not scored, or "
            "name the reward columns with --rewards."
        )
    return values


def _values(
    chunk: pd.DataFrame, file: Path, layout: Layout, names: list[str], start: int, replaced: dict[str, list[str]]
) -> pd.DataFrame:
    """The rows of `chunk` with hashes for texts and numbers for the columns `names`, called `reward <name>`."""
    columns = {f"reward {name}": _checked_numbers(chunk, name, file, start) for name in names}
    for name in names:
        column = [] if _is_numeric(chunk[name]) else chunk[name]
        cells = [cell for cell in column if isinstance(cell, str) and cell.strip().lower() in NO_VALUE[1:]]
        if cells:
            replaced.setdefault(name, []).extend(cells)
    columns["completion"], columns["length"] = hash_texts(chunk[layout.completion])
    columns["prompt"] = np.zeros(len(chunk), dtype=np.uint64)
    if layout.prompt is not None:
        prompts = chunk[layout.prompt]
        columns["prompt"], _ = hash_texts(prompts)
        # Once for each prompt, of which there are fewer than rows.
        _, first_rows = np.unique(columns["prompt"], return_index=True)
        empty = sorted(row for row in first_rows.tolist() if _is_empty(prompts.iloc[row]))
        if empty:
            raise UsageError(
                f"'{file}', row {start + empty[0] + 1} has no prompt: `{layout.prompt}` is null or empty there. "
                "Rollouts are compared with those of the same prompt; fill the column."
            )
    steps = np.full(len(chunk), step_in_name(file) if layout.step_in_name else 0.0)
    if layout.step is not None:
        steps = _checked_numbers(chunk, layout.step, file, start)
        wrong = np.flatnonzero(~((np.abs(steps) < 2**53) & (steps == np.floor(steps))))
        if len(wrong):
            raise UsageError(
                f"'{file}', row {start + wrong[0] + 1}: the `{layout.step}` {steps[wrong[0]]:g} is not a whole "
                "number. Number the steps 0, 1, 2, …, or remove the column."
            )
    return pd.DataFrame(columns | {"step": steps.astype(np.int64)})


def _is_empty(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return not prompt.strip()
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return not any(bool(_content(message)) for message in prompt)
    return prompt is None or prompt is pd.NA or (isinstance(prompt, float) and np.isnan(prompt)) or prompt == {}


def _content(message: Any) -> bool:
    content = message.get("content", message) if isinstance(message, dict) else message
    return content is not None and (not hasattr(content, "__len__") or len(content) > 0)


def hash_texts(values: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64, and lengths, int64, of prompts or completions: text or messages."""
    listed = list(values)
    texts: np.ndarray = np.empty(len(listed), dtype=object)
    texts[:] = [
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in listed
    ]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    try:
        return pd.util.hash_array(texts, categorize=False), lengths
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        texts[:] = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
        return pd.util.hash_array(texts, categorize=False), lengths
