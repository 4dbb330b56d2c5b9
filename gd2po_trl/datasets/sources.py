"""Reading rows from a local file, a folder or the Hub, with errors that name the source, the row and the remedy."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..user_input import is_hub_id


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
# What a file or folder is called for a split.
SPLIT_NAMES = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "validation": {"validation", "valid", "val", "dev", "eval"},
}
ALL_SPLIT_NAMES = set().union(*SPLIT_NAMES.values())
# What the loaders read as text. In a CSV file these columns are text even where every cell reads as a number.
TEXT_COLUMNS = {"prompt", "answer", "completion", "instruction", "input", "output"}
TEXT_COLUMNS |= {"chosen", "rejected", "response_0", "response_1"}
# Up to 15 digits, which a float holds exactly. `007` and `+5` are no numbers: they could not be written back.
NUMBER_OR_BOOLEAN = r"(-?(0|[1-9]\d{0,14})(\.\d+)?([eE][-+]?\d+)?|True|TRUE|true|False|FALSE|false)?"


@dataclass(frozen=True)
class Source:
    """Where a data set is read from."""

    name: str
    default_path: str | None = None  # Hub id used when the caller gives no path
    default_split: str = "train"
    file_hints: tuple[str, ...] = ()  # in the names of its files, where several data sets lie side by side
    remedy: str = "give `dataset_path`"


@dataclass
class DatasetReport:
    """How many rows were read, and how many were left out for which reason."""

    name: str
    origin: str
    read: int
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items() if count)
        return (
            f"{self.name}: {self.kept:,} of {self.read:,} rows kept ({reasons or 'none dropped'}), from {self.origin}"
        )


def data_suffix(path: Path) -> str | None:
    """The suffix that tells the format of a data file (`.json` for `rows.json.gz`), `None` where it is not one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in BUILDERS else None


def stem_of(path: Path) -> str:
    """File name without suffixes and without a shard number, in lower case, words joined by `_`."""
    name = path.name.lower()
    for suffix in reversed(path.suffixes):
        if suffix.lower() in BUILDERS or suffix.lower() in COMPRESSIONS:
            name = name.removesuffix(suffix.lower())
    name = re.sub(r"-\d{5}-of-\d{5}$", "", name)
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def find_local_files(folder: Path, split: str, source: Source, dimension: str | None = None) -> list[Path]:
    """
    The files of a folder that hold one split of one data set.

    A file counts when its name carries the data set's name and the split, or is the split. Only for the default split,
    files whose names carry no split at all count as well.

    Raises:
        [`UsageError`]: No file fits, or the files that fit are of several formats.
    """
    split_key = re.sub(r"[^a-z0-9]+", "_", split.lower())
    # Copies of Hub repositories keep their files in data/.
    places = [sorted(path for path in place.glob("*") if data_suffix(path)) for place in (folder, folder / "data")]
    files = places[0] or places[1]
    candidates = [path for path in files if dimension is None or dimension in stem_of(path)]

    def named(path: Path) -> bool:
        return any(hint in stem_of(path) for hint in source.file_hints)

    def without_split(path: Path) -> bool:
        return not ALL_SPLIT_NAMES & set(stem_of(path).split("_"))

    choices = [
        [path for path in candidates if named(path) and f"_{split_key}_" in f"_{stem_of(path)}_"],
        [path for path in candidates if stem_of(path) == split_key],
    ]
    if split == source.default_split:
        choices.append([path for path in candidates if named(path) and without_split(path)])
        choices.append([path for path in candidates if len(files) == 1 and without_split(path)])
    found = next((choice for choice in choices if choice), [])
    if not found and dimension is None:
        everywhere = _files_below(folder, source.file_hints)
        found = _files_of_split(folder, everywhere, split, is_default=split == source.default_split)
        if found and len({data_suffix(path) for path in found}) == 1:
            return found
        files = files or everywhere
    names = ", ".join(str(path.relative_to(folder)) for path in files[:10]) or "no parquet, JSON, JSONL or CSV file"
    if not found:
        what = f"split {split!r}" + (f", dimension {dimension!r}," if dimension else "")
        raise UsageError(
            f"{source.name}: {what} not found in folder {folder} (it holds: {names}); name the file itself"
        )
    if len({data_suffix(path) for path in found}) > 1 or len({stem_of(path) for path in found}) > 1:
        fitting = ", ".join(path.name for path in found)
        raise UsageError(f"{source.name}: several files in {folder} fit split {split!r}: {fitting}; name one of them")
    return found


def _files_below(folder: Path, hints: Sequence[str]) -> list[Path]:
    """Data files at any depth, outside hidden folders such as a cache, with one of `hints` in their path."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if data_suffix(path) and path.is_file()):
        inside = path.relative_to(folder)
        words = re.sub(r"[^a-z0-9]+", "_", inside.as_posix().lower())
        is_named = not hints or any(hint in words for hint in hints)
        if is_named and not any(part.startswith((".", "_")) for part in inside.parts):
            found.append(path)
    return found


def _files_of_split(folder: Path, files: Sequence[Path], split: str, is_default: bool) -> list[Path]:
    """
    The files that hold a split, by a word of their own name or of a folder above them, such as
    `default/train/0000.parquet`; for the default split, also files without any such word: shards, or folders by year.
    Empty if none fits, or if files of different names could each be what is meant.
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


def _load_saved(folder: Path, split: str, name: str) -> "Dataset | None":
    """The split of a data set that `save_to_disk` wrote to `folder`; `None` if it did not."""
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


def load_rows(
    source: Source, path: str | None, split: str | None, *, dimension: str | None = None, hub_dir: str | None = None
) -> tuple["Dataset", str]:
    """
    Rows as they are, through `datasets.load_dataset`, and where they came from, for messages.

    A single local file is read whole, whatever the split; a slice such as `"train[:100]"` works everywhere. A file in
    a folder must have the word `dimension` in its name; `hub_dir` is the folder of a Hub repository to read.

    Raises:
        [`UsageError`]: Nothing there, no such split, an unreadable file, or no rows.
    """
    split = split or source.default_split
    path = path or source.default_path
    if path is None:
        raise UsageError(f"{source.name}: no path given and no Hub id known; {source.remedy}")
    local = Path(path).expanduser()
    if local.is_dir() and (saved := _load_saved(local, split.split("[")[0], source.name)) is not None:
        if len(saved) == 0:
            raise UsageError(f"{source.name}: {path} holds no rows")
        return saved, str(path)
    if local.is_dir():
        files = find_local_files(local, split.split("[")[0], source, dimension)
    elif local.exists():
        if data_suffix(local) is None:
            raise UsageError(f"{source.name}: {path} is not a parquet, JSON, JSONL or CSV file")
        files = [local]
    elif is_hub_id(path):
        files = []
    else:
        raise UsageError(f"{source.name}: no such file or folder: {path} (a Hub id has the form owner/name)")

    from datasets import load_dataset

    if files:
        origin = str(files[0]) if len(files) == 1 else f"{local} (split {split!r}, {len(files)} files)"
        data_files = {split.split("[")[0]: [str(file) for file in files]}
        builder = BUILDERS[str(data_suffix(files[0]))]
        arguments: dict[str, Any] = {"path": builder, "data_files": data_files}
        hint = "cannot be read; every row needs the same columns of the same types"
        if not any(file.stat().st_size for file in files):
            raise UsageError(f"{source.name}: {origin} holds no rows")
    else:
        builder = None
        origin = f"Hub data set {path} (split {split!r})"
        arguments = {"path": path, "data_dir": hub_dir}
        hint = "cannot be loaded; check the id, the split and the connection, or give a local file"
    try:
        if builder == "json":
            # By any name but "utf-8" the file is decoded while it is read, so that other encodings fail here.
            arguments["encoding"] = "utf-8-sig"
        elif builder == "csv":
            arguments |= _csv_options(files)
        dataset = load_dataset(**arguments, split=split)
        if builder == "json" and (features := _without_timestamps(dataset.features)) != dataset.features:
            # pyarrow takes text such as 2024-05-01 for a point in time, and how it was written is lost.
            dataset = load_dataset(**arguments, split=split, features=features)
    except Exception as error:  # whatever `datasets`, pyarrow or the Hub client raise; the cause stays attached
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            hint = "cannot be read; save it as UTF-8"
        elif builder == "json" and (broken := _broken_json(files)) is not None:
            raise UsageError(f"{source.name}: {origin} cannot be read: {broken}") from error
        lines = str(cause).strip().splitlines()
        raise UsageError(f"{source.name}: {origin} {hint}: {lines[0] if lines else type(error).__name__}") from error
    if len(dataset) == 0:
        raise UsageError(f"{source.name}: {origin} holds no rows")
    return dataset, origin


def _broken_json(files: Iterable[Path]) -> str | None:
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


def _csv_options(files: Sequence[Path]) -> dict[str, Any]:
    """Options that keep text as it is written: `None` and `NA` are words, and `007` is no number."""
    from pandas import read_csv

    text_columns = set(TEXT_COLUMNS)
    for file in files:
        cells = read_csv(file, dtype=str, keep_default_na=False)
        text_columns |= {name for name in cells if not cells[name].str.fullmatch(NUMBER_OR_BOOLEAN, na=True).all()}
    converters = dict.fromkeys(sorted(text_columns), _text_of_cell)
    return {"keep_default_na": False, "na_values": [""], "converters": converters}


def _text_of_cell(cell: str) -> str | None:
    return cell or None


def _without_timestamps(feature: Any) -> Any:
    """A column type with any JSON value in place of a point in time."""
    from datasets import Json, LargeList, List, Value

    if isinstance(feature, dict):
        return type(feature)({name: _without_timestamps(part) for name, part in feature.items()})
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_without_timestamps(feature.feature))
    return Json() if isinstance(feature, Value) and feature.dtype.startswith("timestamp") else feature


def require_columns(dataset: "Dataset", columns: Iterable[str], name: str, origin: str, remedy: str) -> None:
    """Raises [`UsageError`], which lists the columns that are there, if one of `columns` is missing."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise UsageError(
            f"{name}: {origin} has no column {', '.join(map(repr, missing))}"
            f" (it has: {', '.join(dataset.column_names)}); {remedy}"
        )


def conversation_feature() -> Any:
    """The column type of a conversation: a list of `role` and `content`."""
    from datasets import Value

    return [{"role": Value("string"), "content": Value("string")}]


def iterate_rows(dataset: "Dataset", columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of some columns, read in batches, which is many times faster than row by row."""
    for batch in dataset.select_columns(list(columns)).iter(1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def checked_text(value: Any, column: str) -> str | None:
    """`value` if it is text or `None`. Raises [`UsageError`], which names `column`, for anything else."""
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"the column `{column}` must be text, got {str(value)[:80]!r}")


def checked_prompt(value: Any, column: str, *, parts: bool = False) -> Any:
    """
    `value` if it is text, `None`, or messages with the text `role` and the text `content`; with `parts`, the content
    may also be a list. Raises [`UsageError`], which names `column`, for anything else.
    """
    contents = (str, list, type(None)) if parts else (str, type(None))
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and "content" in message
        and isinstance(message["content"], contents)
        for message in value
    ):
        return value
    raise UsageError(
        f"the column `{column}` must be text or a list of messages with the texts `role` and `content`, got"
        f" {str(value)[:80]!r}"
    )


def convert_rows(
    dataset: "Dataset",
    convert: Callable[[dict[str, Any]], dict[str, Any]],
    features: dict[str, Any],
    report: DatasetReport,
    inputs: Iterable[str],
    remove: Iterable[str] = (),
) -> "Dataset":
    """
    The columns that `convert` makes of those of a row that it reads (`inputs`, as far as they are there), in memory,
    then all others but those to `remove`. A `UsageError` of `convert` is completed with the row and the origin.
    """
    from datasets import Dataset, Features, concatenate_datasets

    columns: dict[str, list[Any]] = {column: [] for column in features}
    present = [column for column in inputs if column in dataset.column_names]
    for index, row in enumerate(iterate_rows(dataset, present)):
        try:
            values = convert(row)
        except UsageError as error:
            raise UsageError(f"{report.name}: row {index} of {report.origin}: {error}") from None
        for column, cells in columns.items():
            cells.append(values[column])
    converted = Dataset.from_dict(columns, features=Features(features))
    replaced = {*remove, *features}
    others = dataset.select_columns([column for column in dataset.column_names if column not in replaced])
    return concatenate_datasets([converted, others], axis=1) if others.column_names else converted


def drop_rows(
    dataset: "Dataset",
    report: DatasetReport,
    *,
    key_columns: Sequence[str] = ("prompt",),
    drop_duplicates: bool | str,
) -> "Dataset":
    """
    Leaves out rows with an empty prompt and, if asked, all but the first of rows that agree in `key_columns`, or with
    `drop_duplicates="all"` the first as well; counts them in `report`, and see [`finish`].

    Raises:
        [`UsageError`]: No row is left, or `drop_duplicates` is something else.
    """
    if drop_duplicates not in (True, False, "all"):
        raise UsageError(f"{report.name}: drop_duplicates must be true, false or 'all', got {drop_duplicates!r}")
    keys: list[str | None] = [
        None if is_empty(row["prompt"]) else repr(list(row.values())) for row in iterate_rows(dataset, key_columns)
    ]
    counts = Counter(keys)
    seen: set[str] = set()
    keep: list[int] = []
    for index, key in enumerate(keys):
        is_duplicate = counts[key] > 1 if drop_duplicates == "all" else drop_duplicates and key in seen
        if key is not None and not is_duplicate:
            keep.append(index)
            seen.add(key)
    empty = counts.get(None, 0)
    report.dropped |= {"with an empty prompt": empty, "duplicates": len(keys) - empty - len(keep)}
    return finish(dataset.select(keep) if len(keep) < len(dataset) else dataset, report)


def finish(dataset: "Dataset", report: DatasetReport) -> "Dataset":
    """Logs the report, stores it as `dataset.info.description`, and refuses a data set without rows."""
    logger.info("%s", report)
    if len(dataset) == 0:
        raise UsageError(f"no row is left: {report}")
    dataset.info.description = str(report)
    return dataset


def is_empty(prompt: str | list[dict[str, Any]] | None) -> bool:
    """Whether a prompt, plain or conversational, says nothing."""
    if prompt is None or isinstance(prompt, str):
        return not (prompt or "").strip()
    return not any(
        message["content"] if isinstance(message["content"], list) else (message["content"] or "").strip()
        for message in prompt
    )
