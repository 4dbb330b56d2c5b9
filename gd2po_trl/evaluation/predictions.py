"""What every evaluation shares: completions that survive a kill, and results that say how they were made.

A run's folder holds `predictions.jsonl` (one line per finished row), `run.json` (the settings that its completions
depend on), and, once everything is scored, `scores.jsonl` and `results.json`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError


PREDICTIONS_FILE = "predictions.jsonl"
RUN_FILE = "run.json"
SCORES_FILE = "scores.jsonl"
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class EvalRow:
    """
    One prompt to complete.

    Args:
        id (`str`): Name of the row, unique within the evaluation.
        prompt (`list[dict[str, str]]` or `str`): Messages with `role` and `content`, or text that the model continues.
    """

    id: str
    prompt: list[dict[str, str]] | str

    @property
    def prompt_sha256(self) -> str:
        """First 16 hex digits of the SHA-256 of the prompt, by which a stored completion knows its prompt."""
        return hashlib.sha256(json.dumps(self.prompt, sort_keys=True).encode()).hexdigest()[:16]


def parse_predictions(content: bytes, source: str) -> dict[str, dict[str, Any]]:
    """
    Predictions by row id, from lines of JSON objects with at least the strings `id` and `completion`, or from one JSON
    object that maps ids to objects with `raw_output`, as the published API-Bank script writes it.

    Raises:
        [`UsageError`]: if a line is something else, or an id occurs twice. It names the line of `source`.
    """
    predictions: dict[str, dict[str, Any]] = {}
    # Not splitlines(), which also cuts at separators such as U+2028 that JSON allows inside a string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        record: Any
        try:
            record, broken = json.loads(line), None
        except (ValueError, RecursionError) as error:
            record, broken = {}, error
        if (
            number == 1
            and isinstance(record, dict)
            and "id" not in record
            and (published := _parse_published(content))
        ):
            return published
        if broken is not None:
            raise UsageError(f"{source}, line {number}: not a JSON object ({broken}).") from None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("id", "completion")):
            raise UsageError(f"{source}, line {number}: each line needs the strings 'id' and 'completion'.")
        if record["id"] in predictions:
            raise UsageError(f"{source}, line {number}: a second completion for row {record['id']!r}.")
        predictions[record["id"]] = record
    return predictions


def _parse_published(content: bytes) -> dict[str, dict[str, Any]] | None:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError):
        return None
    values = records.values() if isinstance(records, dict) else [None]
    if not all(isinstance(value, dict) and isinstance(value.get("raw_output"), str) for value in values):
        return None
    return {key: {"id": key, "completion": value["raw_output"]} for key, value in records.items()}


def prefill_of(record: dict[str, Any]) -> str:
    """The start of the assistant's turn that stands in the prompt, from a record of predictions."""
    prefill = record.get("prefill")
    return prefill if isinstance(prefill, str) else ""


def read_predictions(path: str | os.PathLike, rows: Sequence[EvalRow]) -> dict[str, dict[str, Any]]:
    """
    The predictions for `rows` from a file that this package or another program wrote; see [`parse_predictions`].

    A row without a line is absent from the result. Lines for other rows are left out.

    Raises:
        [`UsageError`]: if the file is missing or unreadable, fits none of the rows, or was made for other prompts.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PREDICTIONS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read the predictions {path}: {error.strerror}.") from None
    predictions = parse_predictions(content, str(path))
    matched = _select(predictions, rows, str(path))
    if not matched:
        known, given = rows[0].id, next(iter(predictions), None)
        raise UsageError(
            f"{path} holds no completion for any row; ids look like {known!r}, the file's like {given!r}."
        )
    return matched


def _select(predictions: dict[str, dict[str, Any]], rows: Sequence[EvalRow], source: str) -> dict[str, dict[str, Any]]:
    selected = {}
    for row in rows:
        if (record := predictions.get(row.id)) is not None:
            if record.get("prompt_sha256") not in (None, row.prompt_sha256):
                raise UsageError(f"{source}: the completion of row {row.id!r} was made for another prompt.")
            selected[row.id] = record
    return selected


def is_predictions(path: str) -> bool:
    """Whether a path holds predictions, as opposed to a model."""
    return Path(path).is_file() or (Path(path) / PREDICTIONS_FILE).is_file()


class PredictionLog:
    """
    The append-only file of predictions for `rows` in a run's folder; a context manager that locks the folder. Lines
    for other rows stay untouched.

    Whole batches are appended in one write and synced, so a kill loses at most the batch in flight. A line that a kill
    cut short is dropped on the next opening.

    Raises:
        [`UsageError`]: on entering, if the folder belongs to a run with another identity (see
            [`GenerationSettings.identity`]), is in use by another process, or holds a damaged file.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], rows: Sequence[EvalRow]):
        self.folder = folder
        self.path = folder / PREDICTIONS_FILE
        self.identity = identity
        self.rows = rows
        self.done: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "PredictionLog":
        from filelock import FileLock, Timeout

        make_folder(self.folder)
        # The kernel releases the lock when the process dies, however it dies.
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"Another evaluation is writing to {self.folder}; wait for it or give another folder."
            ) from None
        try:
            self._check_identity()
            self._repair()
            self._records = parse_predictions(self.path.read_bytes(), str(self.path)) if self.path.exists() else {}
            self.done = _select(self._records, self.rows, str(self.path))
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._lock.release()

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """
        Adds finished rows; they are on the disk when this returns.

        Raises:
            [`UsageError`]: if they cannot be written, as on a full disk. None of them is then in the file.
        """
        rest = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        with open(self.path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(before)
                raise UsageError(
                    f"Cannot write {self.path}: {error.strerror}. The rows before are kept; repeat the command to go "
                    "on."
                ) from error
        for record in records:
            self._records[record["id"]] = self.done[record["id"]] = record

    def finish(self) -> None:
        """Puts the lines into the order of the rows (they were made by length), lines of other rows last."""
        wanted = dict.fromkeys(row.id for row in self.rows if row.id in self._records)
        order = [*wanted, *(key for key in self._records if key not in wanted)]
        if order != list(self._records):
            write_atomically(self.path, "".join(json.dumps(self._records[key]) + "\n" for key in order))

    def _check_identity(self) -> None:
        run_file = self.folder / RUN_FILE
        if not run_file.exists():
            if self.path.exists():
                raise UsageError(
                    f"{self.path} exists without {RUN_FILE}, so nobody knows how it was made. Score it with "
                    "--predictions, or give another --output."
                )
            write_atomically(run_file, json.dumps(self.identity, indent=2) + "\n")
            return
        try:
            before = json.loads(run_file.read_text())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(
                f"{run_file} is damaged; give another --output, or delete it together with {PREDICTIONS_FILE}."
            )
        changes = [
            f"{key} was {before.get(key)!r} and is now {self.identity.get(key)!r}"
            for key in {**before, **self.identity}
            if before.get(key) != self.identity.get(key)
        ]
        if changes:
            raise UsageError(
                f"{self.folder} holds a run with other settings: {'; '.join(changes)}. Give another --output, or "
                f"delete {RUN_FILE} and {PREDICTIONS_FILE} in it to start anew."
            )

    def _repair(self) -> None:
        if self.path.exists():
            with open(self.path, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
                os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Makes a folder for results, if it is not there. Raises [`UsageError`] if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write to a folder {folder}: {error.strerror}. Give another --output.") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is either the old or the new one, never half, whatever happens."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror}.") from error
