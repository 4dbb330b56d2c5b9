"""
API-Bank in ToolRL's format: does the model make the one tool call that each of 597 dialogues asks for?

Two protocols score the same completions. `reference` gives the numbers of the published scorer and is the one to
compare with published figures. `strict`, the default, mends its defects:

1. A right call among others scores 1 in `reference`. In `strict` the answer must hold exactly one call.
2. A call without `name` or `parameters` is given the gold name in `reference`, so that the bare parameters score 1.
   `strict` wants both.
3. An entry that is JSON but no object or list (`5`, `null`) ends the search in `reference`: a right call after it
   scores 0, before it 1. In `strict` any entry beside the call makes the answer wrong, wherever it stands.
4. `reference` reads the first `<tool_call>` anywhere, also in the thoughts; `strict` reads only what follows the last
   `</think>`.
5. Gold values are all strings, also where the tool declares a number, a Boolean or a list. `reference` compares as
   Python does, so `5` is not `"5"`. In `strict` a JSON value that is no string is compared with the value that the
   gold text stands for: `5` and `5.0` equal `"5"`, `true` equals `"True"`, `["a"]` equals `"['a']"`. Strings must be
   the same.
6. Rows without a completion leave the denominator in `reference`. In `strict` they are wrong.
7. The format of `reference` allows any text around the parts, that of `strict` only white space.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...evaluation.intervals import wilson_interval
from ...evaluation.predictions import RESULTS_FILE, EvalRow, prefill_of, write_atomically
from ...messages import continued
from ...reporting import decimals, print_table
from .text_format import (
    parse_calls,
    parse_gold,
    parse_json,
    split_completion,
    think_text,
    values_equal,
)


LEADERBOARD_FILE = "leaderboard.json"
PROTOCOLS = ("strict", "reference")
_TAGS = ("think", "tool_call", "response")
# The word count from which on the published length score is 1.
_MAX_WORDS = 512


@dataclass(frozen=True)
class ApiBankRow(EvalRow):
    """One dialogue."""

    level: int
    gold: dict[str, Any]  # the expected call, with `name` and `parameters`


@dataclass(frozen=True)
class ApiBankScore:
    """
    Score of one completion.

    Args:
        correct (`bool` or `None`): Whether the call is right; `None` where the protocol leaves the row out.
        reason (`str`):
            `"correct"`, or what is wrong: `"missing"` (no completion), `"no_call"`, `"malformed"`, `"several_calls"`,
            `"wrong_name"`, `"wrong_parameters"`, and in `reference` just `"wrong"`.
        format (`bool`): Whether the tags are in order.
        length (`float`): Words of thought divided by 512, rounded to 2 decimals, at most 1.
        think_words (`int`): Words of thought.
    """

    correct: bool | None
    reason: str
    format: bool
    length: float
    think_words: int = 0


def load_rows(folder: str | None, levels: Sequence[int] = (1, 2, 3), limit: int | None = None) -> list[ApiBankRow]:
    """
    Loads the dialogues; ids are `Level1_0`, ... as in the published result files.

    Args:
        folder (`str`): Folder with `level-1-api_processed.json`, ...
        levels (`Sequence[int]`, defaults to `(1, 2, 3)`): Levels to load.
        limit (`int`, *optional*): First rows of each level. All by default.

    Raises:
        [`UsageError`]: if a file is missing or a row has no gold call.
    """
    from .data import load_api_bank

    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1.")
    return [
        ApiBankRow(
            id=f"Level{row['level']}_{row['index']}",
            prompt=row["prompt"],
            level=row["level"],
            gold=parse_gold(row["answer"]).calls[0],
        )
        for row in load_api_bank(folder, levels=levels)
        if limit is None or row["index"] < limit
    ]


def score_completion(completion: str | None, gold: dict[str, Any], protocol: str = "strict") -> ApiBankScore:
    """
    Scores one completion; never raises on what a model wrote.

    Args:
        completion (`str`, *optional*): The model's text; `None` if there is none.
        gold (`dict[str, Any]`): The expected call, with `name` and `parameters`.
        protocol (`str`, defaults to `"strict"`): `"strict"` or `"reference"`.
    """
    if completion is None:
        return ApiBankScore(None if protocol == "reference" else False, "missing", False, 0.0)
    text = completion.strip()
    if protocol == "reference":
        correct = _reference_correct(text, gold)
        reason, in_order, words = "correct" if correct else "wrong", _tags_in_order(text), _reference_words(text)
    else:
        reason = _strict_reason(text, gold)
        correct = reason == "correct"
        in_order = _tags_in_order(text) and not _text_outside_parts(text)
        words = len((think_text(text) or "").split())
    return ApiBankScore(correct, reason, in_order, min(round(words / _MAX_WORDS, 2), 1.0), words)


def _strict_reason(text: str, gold: dict[str, Any]) -> str:
    parts = split_completion(text)
    if parts.tool_call is None:
        return "no_call"
    calls = parse_calls(parts.tool_call)
    if calls is None:
        return "malformed"
    _, opened, later = parts.answer.partition("</tool_call>")[2].partition("<tool_call>")
    if len(calls) != 1 or (opened and "</tool_call>" in later):
        return "several_calls"
    call = calls[0]
    if not isinstance(call, dict) or not isinstance(call.get("parameters"), dict) or "name" not in call:
        return "malformed"
    if call["name"] != gold["name"]:
        return "wrong_name"
    given, expected = call["parameters"], gold["parameters"]
    same = given.keys() == expected.keys() and all(stands_for(given[key], expected[key]) for key in expected)
    return "correct" if same else "wrong_parameters"


def stands_for(value: Any, gold: Any) -> bool:
    """
    Whether a JSON value says what a gold value says. A string must equal it; any other value is compared with what the
    gold text stands for as a Python literal: `5` and `5.0` stand for `"5"`, `["a"]` for `"['a']"`.
    """
    if isinstance(value, str) or not isinstance(gold, str):
        if isinstance(value, list) and isinstance(gold, list):
            return len(value) == len(gold) and all(map(stands_for, value, gold))
        if isinstance(value, dict) and isinstance(gold, dict):
            return value.keys() == gold.keys() and all(stands_for(value[key], gold[key]) for key in gold)
        return isinstance(value, bool) == isinstance(gold, bool) and values_equal(value, gold)
    try:
        literal = ast.literal_eval(gold)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return not isinstance(literal, str) and stands_for(value, literal)


def _reference_correct(text: str, gold: dict[str, Any]) -> bool:
    if "<tool_call>" not in text or "</tool_call>" not in text:
        return False
    block = text.partition("<tool_call>")[2].partition("</tool_call>")[0]
    for line in block.splitlines():
        try:
            call = parse_json(line.strip())
        except ValueError:
            continue
        try:
            if isinstance(call, str):
                call = parse_json(call)
            complete = "name" in call and "parameters" in call
            name, parameters = (call["name"], call["parameters"]) if complete else (gold["name"], call)
        except (TypeError, ValueError):
            return False
        if name == gold["name"] and values_equal(parameters, gold["parameters"]):
            return True
    return False


def _tags_in_order(text: str) -> bool:
    """At most one of each tag, all closed, thoughts first, then a call or a response, or both in this order."""
    spans = {}
    for tag in _TAGS:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != text.count(closing) or text.count(opening) > 1:
            return False
        if opening in text:
            spans[tag] = (text.index(opening), text.index(closing))
    order = [position for tag in _TAGS if tag in spans for position in spans[tag]]
    return "think" in spans and len(spans) > 1 and order == sorted(order)


def _text_outside_parts(text: str) -> bool:
    for tag in _TAGS:
        before, _, rest = text.partition(f"<{tag}>")
        if rest:
            text = before + rest.partition(f"</{tag}>")[2]
    return bool(text.strip())


def _reference_words(text: str) -> int:
    start, end = text.find("<think>"), text.find("</think>")
    return len(text[start + len("<think>") : end].split()) if 0 <= start < end else 0


def score_predictions(
    rows: Sequence[ApiBankRow], predictions: dict[str, dict[str, Any]], protocol: str = "strict"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Scores all rows.

    Args:
        rows (`Sequence[ApiBankRow]`): The dialogues.
        predictions (`dict[str, dict]`): Completions by row id; see [`~evaluation.running.generate_predictions`]. The
            thoughts that a prompt opened (`prefill`) count as the completion's.
        protocol (`str`, defaults to `"strict"`): `"strict"` or `"reference"`.

    Returns:
        `tuple[dict, list[dict]]`: The results with `levels` and `overall` (the average over rows, not over levels),
        and one score per row. `accuracy`, its 95 % Wilson interval and `format` are in percent with two decimals,
        over `scored` rows: all in `strict`, those with a completion in `reference`. `accuracy_all_rows` is over all
        rows in both.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}.")
    scored = []
    for row in rows:
        record = predictions.get(row.id, {"error": "no prediction"})
        # Where the chat template has opened the thoughts, the model cannot.
        completion = continued(prefill_of(record), record["completion"]) if record.get("error") is None else None
        score = score_completion(completion, row.gold, protocol)
        scored.append({"id": row.id, "level": row.level, **vars(score), "finish_reason": record.get("finish_reason")})
    levels = {
        str(level): _summary([score for score in scored if score["level"] == level])
        for level in sorted({row.level for row in rows})
    }
    results = {"task": "api-bank", "protocol": protocol, "levels": levels, "overall": _summary(scored)}
    return results, scored


def _summary(scores: list[dict[str, Any]]) -> dict[str, Any]:
    counted = [score for score in scores if score["correct"] is not None]
    correct = sum(score["correct"] for score in counted)
    low, high = wilson_interval(correct, len(counted))
    return {
        "rows": len(scores),
        "scored": len(counted),
        "correct": correct,
        "accuracy": _percent(correct, len(counted)),
        "accuracy_interval": [round(100 * low, 2), round(100 * high, 2)],
        "accuracy_all_rows": _percent(correct, len(scores)),
        "format": _percent(sum(score["format"] for score in counted), len(counted)),
        "length": _mean([score["length"] for score in counted]),
        "think_words": _mean([score["think_words"] for score in counted]),
        "missing": sum(score["reason"] == "missing" for score in scores),
        "cut_off": sum(score["finish_reason"] == "length" for score in scores),
        "reasons": dict(Counter(score["reason"] for score in scores).most_common()),
    }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _percent(part: int, whole: int) -> float | None:
    return round(part / whole * 100, 2) if whole else None


def print_results(results: dict[str, Any]) -> None:
    """Prints the table of results; its caption says what it can be compared with, and what is missing."""
    summaries = {f"level {level}": summary for level, summary in results["levels"].items()}
    lines = []
    for name, summary in {**summaries, "overall": results["overall"]}.items():
        low, high = summary["accuracy_interval"]
        lines.append(
            [
                name,
                decimals(summary["accuracy"], 2) + (f" ({low:.1f} to {high:.1f})" if summary["scored"] else ""),
                *(
                    decimals(summary[key], digits)
                    for key, digits in (("format", 2), ("length", 4), ("think_words", 1))
                ),
                f"{summary['correct']}/{summary['scored']}",
                str(summary["cut_off"]),
            ]
        )
    notes = {
        "strict": ["The published scorer's defects are mended; --protocol reference is comparable with its figures."],
        "reference": ["Comparable with published figures."],
    }[results["protocol"]]
    if missing := results["overall"]["missing"]:
        effect = "count as wrong" if results["protocol"] == "strict" else "are left out of the accuracy"
        notes.append(f"{missing} rows without a completion {effect}.")
    columns = ["", "accuracy % (95 % interval)", "format %", "length 0 to 1", "think words", "correct", "cut off"]
    print_table(f"API-Bank, protocol {results['protocol']}", columns, lines, "\n".join(notes))


def find_runs(folders: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """
    The content of each API-Bank evaluation's `results.json` in some folders and below, by the run's folder, relative
    to the one that was searched.

    Raises:
        [`UsageError`]: if a folder is missing, a file is damaged, or there is no such evaluation.
    """
    runs: dict[str, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"There is no folder {folder} to look for evaluations in.")
        for path in sorted(folder.rglob(RESULTS_FILE)):
            try:
                results = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UsageError(f"{path} is damaged: {error}.") from error
            if not isinstance(results, dict) or results.get("task") != "api-bank":
                continue
            name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.resolve().name
            runs[name if name not in runs else str(path.parent)] = results
    if not runs:
        raise UsageError(f"No {RESULTS_FILE} of `gd2po eval api-bank` in {', '.join(map(str, folders))}.")
    return runs


def rank(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """
    The figures of each run, per level and overall, within a protocol sorted by overall accuracy, then format, then
    length, as the published leaderboard is.
    """
    figures = ("accuracy", "format", "length", "think_words", "correct", "scored")
    board = {}
    for name, results in runs.items():
        levels = {**results["levels"], "overall": results["overall"]}
        # Results of version 0.1 have no count of words.
        entry = {level: {figure: summary.get(figure) for figure in figures} for level, summary in levels.items()}
        board[name] = {"protocol": results["protocol"], **entry}

    def place(item: tuple[str, dict[str, Any]]) -> tuple:
        overall = item[1]["overall"]
        values = (overall["accuracy"], overall["format"], overall["length"])
        return item[1]["protocol"], *(-1 if value is None else -value for value in values), item[0]

    return dict(sorted(board.items(), key=place))


def print_leaderboard(runs: dict[str, dict[str, Any]], output: str | Path | None) -> None:
    """Prints the leaderboard, one table for each protocol, and writes it to the file `output`, if there is one."""
    board = rank(runs)
    if output is not None:
        write_atomically(Path(output), json.dumps(board, indent=2, ensure_ascii=False) + "\n")
    for protocol in dict.fromkeys(entry["protocol"] for entry in board.values()):
        entries = {name: entry for name, entry in board.items() if entry["protocol"] == protocol}
        levels = sorted({level for entry in entries.values() for level in entry} - {"protocol", "overall"})
        lines = []
        for name, entry in entries.items():
            overall = entry["overall"]
            accuracies = [decimals(entry.get(level, {}).get("accuracy"), 2) for level in levels]
            others = [
                decimals(overall["format"], 2),
                decimals(overall["length"], 4),
                decimals(overall["think_words"], 1),
            ]
            lines.append([name, decimals(overall["accuracy"], 2), *accuracies, *others])
        of_levels = [f"level {level} %" for level in levels]
        columns = ["", "accuracy %", *of_levels, "format %", "length", "think words"]
        print_table(f"API-Bank, protocol {protocol}", columns, lines)
    if output is not None:
        print(f"Leaderboard: {output}")
