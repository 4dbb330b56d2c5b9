"""Files of logged rollouts as tables of one rollout per row, whether TRL, ms-swift, verl or NeMo-RL wrote them."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".parquet", *CSV_SUFFIXES, *JSON_SUFFIXES)
# Rows in memory at a time.
CHUNK_ROWS = 8192

# What a column is called, the first that is there.
PROMPTS = ("prompt", "input", "prompts", "question", "query")
COMPLETIONS = ("completion", "output", "response", "completions", "responses")
STEPS = ("step", "global_step", "gen_step")
# Where the step of all rows stands in the name of the file: NeMo-RL's train_data_step3.jsonl, or 3.jsonl.
STEP_IN_NAME = re.compile(r"(?:.*[_.-])?step[_-]?(\d+)|(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """
    Where the files keep what.

    Args:
        prompt (`str` or `None`): Column of the prompts. `None` where prompt and completion are one text, as NeMo-RL
            logs them: then only the order of the rows tells which rollouts belong together.
        completion (`str`): Column of the completions.
        step (`str` or `None`): Column of the training step, if there is one.
        step_in_name (`bool`): Whether the names of the files tell the step.
        totals (`tuple[str, ...]`): Columns that hold a total by the definition of the program that wrote the file.
    """

    prompt: str | None = "prompt"
    completion: str = "completion"
    step: str | None = None
    step_in_name: bool = False
    totals: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The columns that hold prompts and completions."""
        return [name for name in (self.prompt, self.completion) if name is not None]


def find_layout(columns: Iterable[str], files: Sequence[Path]) -> Layout:
    """The layout of `files`, of which the first has `columns`. Raises [`UsageError`] for one that is not known."""
    present = [str(column) for column in columns]
    prompt = next((name for name in PROMPTS if name in present), None)
    completion = next((name for name in COMPLETIONS if name in present), None)
    totals: tuple[str, ...] = ()
    if (prompt, completion) == ("input", "output"):
        totals = ("score", "reward")
    elif completion is None and prompt is None and "content" in present:
        completion, totals = "content", ("rewards", "total_reward")
    if completion is None or (prompt is None and completion != "content"):
        missing = [name for name, there in (("prompt", prompt), ("completion", completion)) if there is None]
        raise _missing(missing, present, files[0])
    step = next((name for name in STEPS if name in present), None)
    return Layout(
        prompt=prompt,
        completion=completion,
        step=step,
        step_in_name=step is None and all(STEP_IN_NAME.fullmatch(file.stem) for file in files),
        totals=totals,
    )


def step_in_name(file: Path) -> int:
    """The training step in the name of `file`; 0 where it has none."""
    match = STEP_IN_NAME.fullmatch(file.stem)
    return int(match.group(1) or match.group(2)) if match else 0


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """
    The files with rollouts behind `sources`: output folders of runs, folders with such files, or files.

    Raises:
        [`UsageError`]: for a source that does not exist, or that holds no rollouts.
    """
    found: dict[Path, Path] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise UsageError(f"'{source}' does not exist. Give the output folder of a run, or files with rollouts.")
        if source.is_file() and source.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"'{source}' has an unknown ending; rollouts are read from {', '.join(SUFFIXES)} (JSON: one object "
                "per line)."
            )
        for file in [source] if source.is_file() else _files_in(source):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _files_in(folder: Path) -> list[Path]:
    completions = folder / "completions"
    present = (completions if completions.is_dir() else folder).iterdir()
    files = sorted((path for path in present if path.suffix.lower() in SUFFIXES and path.is_file()), key=_natural)
    tables = [path for path in files if path.suffix == ".parquet"]
    # The output folder of a run without logged completions is full of other JSON, logging.jsonl of ms-swift among it.
    lines = [path for path in files if path.suffix.lower() != ".json" and path.stem != "logging"]
    training = [path for path in lines if path.name.startswith("train_data_step")]  # NeMo-RL's, not its val_data_step
    if not (tables or training or lines):
        raise UsageError(
            f"'{folder}' holds no logged completions. Train with `log_completions=True` (TRL then writes "
            "completions/completions_*.parquet), or give JSONL or CSV files with the columns prompt, completion and "
            "one per reward."
        )
    return tables or training or lines


def _natural(path: Path) -> list[str | int]:
    """Sorts 2.jsonl before 10.jsonl."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def is_trl_table(file: Path) -> bool:
    """Whether `file` is called as TRL calls the completions of a logging step."""
    return file.name.startswith("completions_") and file.suffix == ".parquet"


def read_chunks(
    file: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> Iterator[pd.DataFrame]:
    """The rows of `file`, some thousand at a time; of `columns` (default: all) the `optional` may be missing."""
    suffix = file.suffix.lower()
    chunks = _parquet_chunks if suffix == ".parquet" else _csv_chunks if suffix in CSV_SUFFIXES else _json_chunks
    try:
        for chunk in chunks(file, columns):
            if columns is not None:
                require(chunk, file, [name for name in columns if name not in optional])
                chunk = chunk.reindex(columns=list(columns))
            yield chunk
    except (pa.ArrowException, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' cannot be read: {str(error).splitlines()[0]}") from error


def require(chunk: pd.DataFrame, file: Path, columns: Iterable[str]) -> None:
    """Raise [`UsageError`] unless `chunk` of `file` has `columns`."""
    missing = [column for column in columns if column not in chunk.columns]
    if missing:
        raise _missing(missing, map(str, chunk.columns), file)


def _missing(missing: Sequence[str], present: Iterable[str], file: Path) -> UsageError:
    remedy = (
        "Rename the column that holds it; a rollout needs prompt, completion and one column per reward."
        if {*missing} & {*PROMPTS, *COMPLETIONS, *STEPS}
        else "Name the reward columns with --rewards, or analyze files with different columns apart."
    )
    names = ", ".join(f"`{name}`" for name in missing)
    return UsageError(f"'{file}' has no column {names} (it has: {', '.join(present)}). {remedy}")


def _csv_chunks(file: Path, columns: Sequence[str] | None) -> Iterable[pd.DataFrame]:
    with file.open(encoding="utf-8-sig") as lines:
        header = lines.readline()
    # As text: what a cell stands for depends on the column, and a prompt of "1e3" stays one.
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    return pd.read_csv(file, sep=max(",;\t", key=header.count), chunksize=CHUNK_ROWS, **options)


def _parquet_chunks(file: Path, columns: Sequence[str] | None) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(file) as table:
        present = table.schema_arrow.names
        selected = None if columns is None else [name for name in present if name in columns]
        for batch in table.iter_batches(CHUNK_ROWS, columns=selected):
            # Nested columns become Python lists and dicts; pandas converts all others.
            yield pd.DataFrame(
                {
                    name: pd.Series(column.to_pylist(), dtype=object)
                    if pa.types.is_nested(column.type)
                    else column.to_pandas()
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
            )


def _json_chunks(file: Path, columns: Sequence[str] | None) -> Iterator[pd.DataFrame]:
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
            records += _rollouts_of(record, file, number)
            if len(records) >= CHUNK_ROWS:
                yield pd.DataFrame(records, dtype=object)
                records = []
    if records:
        yield pd.DataFrame(records, dtype=object)


def _rollouts_of(record: dict, file: Path, line: int) -> list[dict]:
    """The rollouts of one line: itself, those of a whole batch (ms-swift), or the rows of a table (W&B)."""
    columns, rows = record.get("columns"), record.get("data")
    if isinstance(columns, list) and isinstance(rows, list):
        return [dict(zip(map(str, columns), row, strict=False)) for row in rows if isinstance(row, list)]
    values = next((record[name] for name in COMPLETIONS if name in record), None)
    # A list of messages is one completion.
    if not isinstance(values, list) or any(isinstance(value, dict) for value in values):
        return [record]
    batched = {name: value for name, value in record.items() if isinstance(value, list)}
    for name, entries in list(batched.items()):
        if len(entries) == len(values):
            continue
        if name in (*PROMPTS, *STEPS) or all(isinstance(entry, (int, float)) for entry in entries):
            raise UsageError(
                f"'{file}', line {line} holds {len(values)} completions and {len(entries)} entries of `{name}`; a "
                "line with several rollouts needs one for each."
            )
        del batched[name]  # the same for all of them
    return [record | {name: entries[index] for name, entries in batched.items()} for index in range(len(values))]
