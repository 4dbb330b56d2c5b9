"""Runs of the API-Bank evaluation, best first."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...evaluation.predictions import RESULTS_FILE, write_atomically
from ...reporting import decimals, print_table


LEADERBOARD_FILE = "leaderboard.json"


def find_runs(folders: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """
    The results of all API-Bank evaluations in some folders and the folders below them.

    Args:
        folders (iterable of `str` or `Path`): Where to look for `results.json`.

    Returns:
        `dict[str, dict]`: The content of `results.json` by the run's folder, relative to the one that was searched.

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
    The figures of each run, sorted by overall accuracy, then format, then length, as the published leaderboard is.

    Returns:
        `dict[str, dict]`: By run `protocol` and, for `"1"`, `"2"`, `"3"` and `"overall"`, `accuracy` and `format` in
        percent, `length`, `think_words`, `correct` and `scored`; best first within a protocol.
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


def write_and_print(runs: dict[str, dict[str, Any]], output: str | Path | None) -> None:
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
