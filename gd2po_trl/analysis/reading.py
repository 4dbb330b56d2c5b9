"""Reads logged rollouts: the completions tables of any TRL `GRPOTrainer` run, or JSONL, CSV and parquet files.

Texts are hashed as they are read and not kept, so that memory grows with the number of rollouts and not with their
length. `read_texts` fetches the few texts that a report shows.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", ".csv", *JSON_SUFFIXES)
# Rows in memory at a time.
CHUNK_ROWS = 8192
# Numeric columns that are no rewards. A numeric column that a reward function logs by `log_extra` looks like a reward;
# the run's `trainer_state.json`, where there is one, tells them apart.
NOT_A_REWARD = re.compile(
    r"gd2po_.*|steps?|global_step|epoch|advantages?|__index_level_\d+__|unnamed: \d+|index|idx|id|.*_(id|idx|index)"
    r"|rank|seed|num_tokens|completion_length|prompt_length",
    re.IGNORECASE,
)


@dataclass
class Rollouts:
    """
    N logged rollouts under K rewards, in the order of the files. Texts are represented by a 64-bit hash.

    Args:
        reward_names (`list[str]`):
            Names of the rewards.
        rewards (`np.ndarray` of shape `(N, K)`, float64):
            NaN where a reward function did not score the rollout.
        step (`np.ndarray` of shape `(N,)`, int64):
            Training step; 0 throughout where the files have no column `step`.
        prompt, completion (`np.ndarray` of shape `(N,)`, uint64):
            Hashes of the texts.
        run (`np.ndarray` of shape `(N,)`, int32):
            Which run (folder) the rollout is from.
        file, row (`np.ndarray` of shape `(N,)`, int32 and int64):
            Where its texts are.
        extra (`dict[str, np.ndarray]`):
            `advantage` and `gd2po_conflict`, where the first file has them; float64, shape `(N,)`, NaN if missing.
        files (`list[Path]`):
            The files.
        has_step (`bool`):
            Whether the files have a column `step`.
        notes (`list[str]`):
            What a reader of the figures has to know.
    """

    reward_names: list[str]
    rewards: np.ndarray
    step: np.ndarray
    prompt: np.ndarray
    completion: np.ndarray
    run: np.ndarray
    file: np.ndarray
    row: np.ndarray
    extra: dict[str, np.ndarray]
    files: list[Path]
    has_step: bool
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.step)


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """
    The files with rollouts behind `sources`: output folders of runs, folders with such files, or files.

    Raises:
        [`UsageError`]: for a source that does not exist, or that holds no rollouts.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        if source.is_file():
            if source.suffix.lower() not in SUFFIXES:
                raise UsageError(
                    f"'{source}' has an unknown ending; rollouts are read from {', '.join(SUFFIXES)} (JSON: one "
                    "object per line)."
                )
            files = [source]
        elif source.is_dir():
            files = _files_in(source)
        else:
            raise UsageError(f"'{source}' does not exist. Give the output folder of a run, or files with rollouts.")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _files_in(folder: Path) -> list[Path]:
    completions = folder / "completions"
    if completions.is_dir():
        folder = completions
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    tables = [path for path in files if path.suffix == ".parquet"]
    # The output folder of a run without logged completions is full of other JSON.
    files = tables or [path for path in files if path.suffix.lower() != ".json"]
    if not files:
        raise UsageError(
            f"'{folder}' holds no logged completions. Train with `log_completions=True` (TRL then writes "
            "completions/completions_*.parquet), or give JSONL or CSV files with the columns prompt, completion and "
            "one per reward."
        )
    return files


def is_trl_table(file: Path) -> bool:
    """Whether `file` is called as TRL calls the completions of a logging step."""
    return file.name.startswith("completions_") and file.suffix == ".parquet"


def read_rollouts(sources: Sequence[str | Path], reward_names: Sequence[str] | None = None) -> Rollouts:
    """
    Read the rollouts of runs or files.

    Args:
        sources (sequence of `str` or `Path`):
            Output folders of runs, folders with files, or parquet, JSONL or CSV files, with the columns `prompt`,
            `completion`, one per reward and, where there are several steps, `step`.
        reward_names (sequence of `str`, *optional*):
            The columns that hold rewards. Where not given, those that the run's `trainer_state.json` names as rewards,
            or else all numeric columns that are no step, advantage, identifier or diagnostic of ours.

    Returns:
        [`Rollouts`]

    Raises:
        [`UsageError`]: if a file cannot be read, or lacks a column; it says which, and what to do.
    """
    files = find_files(sources)
    notes = []
    chunks_of_first = _chunks(files[0])
    first = next(chunks_of_first, None)
    if first is None:
        raise UsageError(f"'{files[0]}' holds no rows.")
    _require(first, files[0], ["prompt", "completion"])
    if reward_names:
        names = list(dict.fromkeys(reward_names))
        _require(first, files[0], names)
    else:
        names = _detect_rewards(first, files[0], notes)
    extra_names = [name for name in ("advantage", "gd2po_conflict") if name in first.columns]

    folders = list(dict.fromkeys(file.parent.resolve() for file in files))
    has_step = "step" in first.columns
    columns = ["prompt", "completion", "step", *names, *extra_names]
    parts: list[dict[str, np.ndarray]] = []
    for index, file in enumerate(files):
        # A JSON object may leave out what is null: a reward that did not score the rollout.
        optional = [*extra_names, *(names if file.suffix.lower() in JSON_SUFFIXES else [])]
        rows = 0
        for chunk in _chunks(file, columns, optional if has_step else [*optional, "step"]):
            if not has_step and chunk["step"].notna().any():
                raise UsageError(
                    f"'{file}' has a column `step` and '{files[0]}' has none; analyse them one after another."
                )
            part = _arrays(chunk, file, names, extra_names, has_step, rows)
            part["file"] = np.full(len(chunk), index, dtype=np.int32)
            part["run"] = np.full(len(chunk), folders.index(file.parent.resolve()), dtype=np.int32)
            part["row"] = np.arange(rows, rows + len(chunk))
            rows += len(chunk)
            parts.append(part)

    joined = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    rewards = joined["rewards"]
    infinite = np.isinf(rewards).sum(0)
    if infinite.any():
        culprit = int(infinite.argmax())
        raise UsageError(
            f"The reward column '{names[culprit]}' holds {infinite[culprit]} infinite values. Replace them by finite "
            "numbers, or leave them empty (not scored)."
        )
    empty = [name for name, scored in zip(names, (~np.isnan(rewards)).any(0), strict=True) if not scored]
    if empty:
        notes.append(f"No rollout has a value of {', '.join(empty)}: left out.")
        rewards = rewards[:, [name not in empty for name in names]]
        names = [name for name in names if name not in empty]
    if not names:
        raise UsageError("No rollout has a reward: every reward column is empty.")
    if len(folders) > 1:
        notes.append(f"Rollouts of {len(folders)} folders are pooled; groups are formed within a folder.")
    if not has_step:
        notes.append("There is no column `step`: all rows count as one step, so nothing is said about change.")
    if any(map(is_trl_table, files)):
        notes.append(
            "TRL's table holds the latest generation batch of each logging step. An evaluation replaces the table of "
            "its step, and nothing in the file tells its rollouts from training ones."
        )
    return Rollouts(
        reward_names=names,
        rewards=rewards,
        step=joined["step"],
        prompt=joined["prompt"],
        completion=joined["completion"],
        run=joined["run"],
        file=joined["file"],
        row=joined["row"],
        extra={name: joined[name] for name in extra_names},
        files=files,
        has_step=has_step,
        notes=notes,
    )


def read_texts(rollouts: Rollouts, indices: Sequence[int]) -> list[tuple[str, str]]:
    """Prompt and completion of the rollouts at `indices`, as plain text, read from their files again."""
    texts: dict[int, tuple[str, str]] = {}
    by_file: dict[int, dict[int, int]] = {}
    for index in indices:
        by_file.setdefault(int(rollouts.file[index]), {})[int(rollouts.row[index])] = index
    for file, rows in by_file.items():
        start = 0
        for chunk in _chunks(rollouts.files[file], ["prompt", "completion"]):
            here = [row for row in rows if start <= row < start + len(chunk)]
            for row in here:
                record = chunk.iloc[row - start]
                texts[rows[row]] = (as_text(record["prompt"]), as_text(record["completion"]))
            start += len(chunk)
            if start > max(rows):
                break
    return [texts[index] for index in indices]


def as_text(value: Any) -> str:
    """Plain text of a prompt or completion: a string as it is, messages as `role: content` lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return json.dumps(value, ensure_ascii=False, default=str)
    lines = []
    for message in value:
        content = message.get("content")
        if isinstance(content, np.ndarray):
            content = content.tolist()
        if isinstance(content, list):
            parts = (part.get("text") or f"[{part.get('type')}]" for part in content if isinstance(part, dict))
            content = " ".join(map(str, parts))
        calls = message.get("tool_calls")
        if calls is not None and len(calls):
            content = f"{content or ''} {json.dumps(list(calls), ensure_ascii=False, default=str)}".strip()
        text = "" if content is None else str(content)
        lines.append(text if len(value) == 1 else f"{message.get('role')}: {text}")
    return "\n".join(lines)


def logged_rewards(file: Path) -> list[dict[str, float]]:
    """The log entries with rewards in the `trainer_state.json` of the run of `file`; `[]` if there is none."""
    folder = file.resolve().parent
    run = folder.parent if folder.name == "completions" else folder
    checkpoints = [path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    newest_first = sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for candidate in (run, *newest_first):
        try:
            history = json.loads((candidate / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        entries = [entry for entry in history if isinstance(entry, dict) and "reward" in entry]
        if entries:
            return entries
    return []


# Files


def _chunks(file: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """The rows of `file`, some thousand at a time; of `columns` (default: all) the `optional` may be missing."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            chunks = _parquet_chunks(file, columns)
        elif suffix == ".csv":
            # As text: an empty cell is the only missing value, and a prompt of "1e3" stays one.
            chunks = pd.read_csv(file, dtype=str, keep_default_na=False, chunksize=CHUNK_ROWS, encoding="utf-8-sig")
        else:
            chunks = _json_chunks(file)
        for chunk in chunks:
            if columns is not None:
                _require(chunk, file, [name for name in columns if name not in optional])
                chunk = chunk.reindex(columns=list(columns))
            yield chunk
    except (pa.ArrowException, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' cannot be read: {str(error).splitlines()[0]}") from error


def _parquet_chunks(file: Path, columns: Sequence[str] | None) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(file) as table:
        present = table.schema_arrow.names
        selected = None if columns is None else [name for name in present if name in columns]
        for batch in table.iter_batches(CHUNK_ROWS, columns=selected):
            # Nested columns become Python lists and dicts, and are the only ones for which pandas is no help.
            yield pd.DataFrame(
                {
                    name: _as_objects(column) if pa.types.is_nested(column.type) else column.to_pandas()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
            )


def _as_objects(column: pa.Array) -> np.ndarray:
    values = np.empty(len(column), dtype=object)
    values[:] = column.to_pylist()
    return values


def _json_chunks(file: Path) -> Iterator[pd.DataFrame]:
    records: list[dict] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"'{file}', line {number} is not JSON ({error}). The file must hold one JSON object per line."
                ) from error
            if not isinstance(record, dict):
                raise UsageError(
                    f"'{file}', line {number} holds a {type(record).__name__}; the file must hold one JSON object per "
                    "line (JSONL), each a rollout."
                )
            records.append(record)
            if len(records) == CHUNK_ROWS:
                yield pd.DataFrame(records, dtype=object)
                records = []
    if records:
        yield pd.DataFrame(records, dtype=object)


def _require(chunk: pd.DataFrame, file: Path, columns: Iterable[str]) -> None:
    missing = [column for column in columns if column not in chunk.columns]
    if missing:
        rewards = [name for name in missing if name not in ("prompt", "completion", "step")]
        remedy = (
            "Name the reward columns with --rewards, or analyse files with different columns apart."
            if rewards
            else "Rename the column that holds it; a rollout needs prompt, completion and one column per reward."
        )
        raise UsageError(
            f"'{file}' has no column {', '.join(f'`{name}`' for name in missing)} (it has: "
            f"{', '.join(map(str, chunk.columns))}). {remedy}"
        )


# Columns


def _detect_rewards(chunk: pd.DataFrame, file: Path, notes: list[str]) -> list[str]:
    logged = {
        match.group(1)
        for entry in logged_rewards(file)
        for key in entry
        if (match := re.fullmatch(r"rewards/(.+)/mean", key))
    }
    names = [str(name) for name in chunk.columns if name in logged]
    if names:
        return names
    candidates = [
        str(name)
        for name in chunk.columns
        if name not in ("prompt", "completion") and not NOT_A_REWARD.fullmatch(str(name))
    ]
    names = [name for name in candidates if _holds_numbers(chunk[name])]
    if not names:
        raise UsageError(
            f"'{file}' has no reward column: of its columns ({', '.join(map(str, chunk.columns))}) none that may hold "
            "a reward is numeric. Name the reward columns with --rewards."
        )
    others = [name for name in candidates if name not in names]
    notes.append(
        f"Taken as rewards, being numeric columns: {', '.join(names)}."
        + (f" Not: {', '.join(others)}." if others else "")
        + " --rewards names others."
    )
    return names


def _holds_numbers(column: pd.Series) -> bool:
    try:
        values = _to_numbers(column)
    except (TypeError, ValueError, OverflowError):
        return False
    return len(values) > 0 and not np.isnan(values).all()


def _to_numbers(column: pd.Series) -> np.ndarray:
    """`column` as float64: NaN for null and empty text. Raises where a value is no number."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.array([_to_number(value) for value in column], dtype=np.float64)


def _to_number(value: Any) -> float:
    if value is None or value is pd.NA or value is pd.NaT:
        return np.nan
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("", "none", "null", "na", "true", "false"):
            return {"true": 1.0, "false": 0.0}.get(text, np.nan)
    return float(value)


def _arrays(
    chunk: pd.DataFrame, file: Path, names: list[str], extra_names: list[str], has_step: bool, start: int
) -> dict[str, np.ndarray]:
    arrays = {"prompt": _hashes(chunk["prompt"]), "completion": _hashes(chunk["completion"])}
    numbers = {}
    for name in [*names, *extra_names, *(["step"] if has_step else [])]:
        try:
            numbers[name] = _to_numbers(chunk[name])
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"'{file}' rows {start + 1} to {start + len(chunk)}: the column `{name}` is not numeric ({error}). "
                "Name the reward columns with --rewards, or correct the file."
            ) from error
    arrays["rewards"] = np.stack([numbers[name] for name in names], axis=1)
    arrays.update({name: numbers[name] for name in extra_names})
    if has_step and not (np.abs(numbers["step"]) < 2**53).all():
        raise UsageError(f"'{file}' has rows whose `step` is no whole number. Fill the column, or remove it.")
    arrays["step"] = numbers["step"].astype(np.int64) if has_step else np.zeros(len(chunk), dtype=np.int64)
    return arrays


def _hashes(column: pd.Series) -> np.ndarray:
    texts = np.empty(len(column), dtype=object)
    texts[:] = [
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in column
    ]
    try:
        return pd.util.hash_array(texts, categorize=False)
    except UnicodeEncodeError:  # JSON can hold half a surrogate pair
        texts[:] = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
        return pd.util.hash_array(texts, categorize=False)
