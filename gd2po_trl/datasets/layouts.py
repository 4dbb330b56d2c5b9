"""Folders of data files in whatever layout they come, data sets saved to disk, and where a JSON file is broken."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError


if TYPE_CHECKING:
    from datasets import Dataset

# What a file or folder is called for a split.
SPLIT_NAMES = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
}
ALL_SPLIT_NAMES = set().union(*SPLIT_NAMES.values())


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Data files at any depth, without those of hidden folders such as a download's cache."""
    return sorted(
        path
        for path in folder.rglob("*")
        if set(path.suffixes) & set(suffixes)
        and path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )


def files_of_split(folder: Path, files: Sequence[Path], split: str, is_default: bool) -> list[Path]:
    """
    The files that hold a split, by a word of their own name or of a folder above them.

    Such as `default/train/0000.parquet` and `mine_train.parquet`. For the default split, files without any such word
    are it: shards, or folders by year.

    Returns:
        `list[Path]`: the files; empty if none fits, or if files of different names could each be what is meant.
    """
    names = next((names for names in SPLIT_NAMES.values() if split in names), {split})
    found = [path for path in files if names & _words(folder, path)]
    if not found and is_default:
        found = [path for path in files if not ALL_SPLIT_NAMES & _words(folder, path)]
        # Shards differ by a number alone; files of other names may hold other things.
        if len({re.sub(r"\d+", "", path.stem) for path in found}) > 1:
            return []
    return found


def _words(folder: Path, path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower()))


def load_saved(folder: Path, split: str, name: str) -> "Dataset | None":
    """
    The split of a data set that `save_to_disk` wrote to `folder`; `None` if it did not.

    Raises:
        [`UsageError`]: if it has other splits only.
    """
    if not (folder / "dataset_dict.json").is_file() and not (folder / "state.json").is_file():
        return None
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # whatever `datasets` or pyarrow raise
        raise UsageError(f"{name}: the saved data set {folder} cannot be read: {error}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UsageError(
                f"{name}: the saved data set {folder} has no split {split!r} (it has: {', '.join(saved)})"
            )
        saved = saved[split]
    return saved


def broken_json(files: Iterable[Path]) -> str | None:
    """
    Where and why the first file that is no JSON, or no JSON lines, is broken, in one line; `None` if that is not it.

    Files are read as JSON lines where their name says so or their first line is a whole value.
    """
    for file in files:
        if file.suffix not in (".json", ".jsonl"):  # compressed
            continue
        text = file.read_bytes().decode("utf-8-sig", errors="replace")
        if file.suffix == ".json" or text.lstrip().startswith("["):
            problem = _problem(text)
            if problem is None or (file.suffix == ".json" and _problem(text.lstrip().partition("\n")[0]) is not None):
                if problem is not None:
                    return f"line {problem[0]}: {problem[1]}"
                continue
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            problem = _problem(line)
            if problem is not None:
                return f"line {number}: {problem[1]}: {line.strip()[:80]}"
            if not isinstance(json.loads(line), dict):
                return f"line {number}: no object, but {line.strip()[:80]}"
    return None


def _problem(text: str) -> tuple[int, str] | None:
    """Line and reason of the first mistake in a JSON text."""
    keys: list[str] = []

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys.extend(key for key in seen if sum(key == other for other, _ in pairs) > 1)
        return seen

    try:
        json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        return error.lineno, f"{error.msg} at character {error.colno}"
    except RecursionError:
        return 1, "nested too deeply"
    return (1, f"the key {keys[0]!r} occurs twice") if keys else None
