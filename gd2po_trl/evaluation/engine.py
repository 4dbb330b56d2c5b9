"""What every evaluation shares: completions that survive a kill, and results that say how they were made.

A run's folder holds `predictions.jsonl` (one line per finished row), `run.json` (the settings that its completions
depend on), and, once everything is scored, `scores.jsonl` and `results.json`.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UsageError


PREDICTIONS_FILE = "predictions.jsonl"
RUN_FILE = "run.json"
SCORES_FILE = "scores.jsonl"
RESULTS_FILE = "results.json"

# What a Hugging Face model folder keeps its weights, tokenizer and chat template in; optimizer states are `.pt`.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_NOT_OF_THE_MODEL = (RUN_FILE, RESULTS_FILE, "trainer_state.json", "training_args.bin")
_REPORTED_PACKAGES = ("gd2po-trl", "torch", "transformers", "trl", "peft", "vllm")


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


@dataclass(frozen=True)
class GenerationSettings:
    """
    How completions are made. Decoding is always greedy, without the penalties of the model's own generation config.

    Args:
        model (`str`): Folder or Hub id of a causal language model, or the folder of a PEFT adapter.
        adapter (`str`, *optional*): Folder or Hub id of a PEFT adapter on top of `model`.
        backend (`str`, defaults to `"transformers"`): `"transformers"` or `"vllm"`.
        max_new_tokens (`int`, defaults to `4096`): Tokens per completion, fewer where the context window ends before.
        max_prompt_tokens (`int`, *optional*): Longer prompts are shortened from the left. Whole prompts by default.
        batch_size (`int`, *optional*):
            Prompts per batch, and so the most that a kill can lose. 8 by default, 256 with vLLM.
        dtype (`str`, defaults to `"auto"`): `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables of the chat template. Give those that the model was trained with.
        max_model_len (`int`, *optional*):
            Context window in tokens, prompt and completion together. The model's own by default.
        tensor_parallel_size (`int`, *optional*):
            GPUs that vLLM splits the model over. 1 by default.
        gpu_memory_utilization (`float`, *optional*):
            Share of each GPU's memory that vLLM takes. vLLM's own default if `None`.
    """

    model: str
    adapter: str | None = None
    backend: str = "transformers"
    max_new_tokens: int = 4096
    max_prompt_tokens: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None

    def __post_init__(self):
        if self.backend not in ("transformers", "vllm"):
            raise UsageError(f"backend is {self.backend!r}; it must be 'transformers' or 'vllm'.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f"dtype is {self.dtype!r}; it must be 'auto', 'float32', 'bfloat16' or 'float16'.")
        for name in ("max_new_tokens", "max_prompt_tokens", "batch_size", "max_model_len", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization is {share}; it must be above 0 and at most 1.")
        for name in ("tensor_parallel_size", "gpu_memory_utilization"):
            if getattr(self, name) is not None and self.backend != "vllm":
                raise UsageError(f"{name} is a setting of vLLM; give --backend vllm as well, or leave it out.")
        config = Path(self.model) / "adapter_config.json"
        if self.adapter is None and config.is_file():
            try:
                content = json.loads(config.read_text())
            except ValueError:
                content = None
            base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
            if not isinstance(base, str) or not base:
                raise UsageError(
                    f"{config} names no base model; give the base as --model and {self.model} as --adapter."
                )
            object.__setattr__(self, "adapter", self.model)
            object.__setattr__(self, "model", base)

    @property
    def rows_per_batch(self) -> int:
        return self.batch_size or (256 if self.backend == "vllm" else 8)

    def identity(self) -> dict[str, Any]:
        """
        Everything that completions depend on. What fits the work to the machine is not part of it, such as the batch
        size: a smaller one must cure a full GPU.
        """
        return {
            "model": fingerprint_model(self.model, "config.json"),
            "adapter": None if self.adapter is None else fingerprint_model(self.adapter, "adapter_config.json"),
            "backend": self.backend,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "dtype": self.dtype,
            "chat_template_kwargs": self.chat_template_kwargs or None,
            "max_model_len": self.max_model_len,
        }


def check_model_exists(settings: GenerationSettings) -> None:
    """
    Finds out whether there is a model, without reading its weights.

    Raises:
        [`UsageError`]: if there is none.
    """
    if Path(settings.model).is_dir():
        _check_model_folder(settings.model, "config.json")
    else:
        fingerprint_model(settings.model, "config.json")


def _check_model_folder(name: str, config_file: str) -> None:
    if not (Path(name) / config_file).is_file():
        raise UsageError(f"The folder {name} holds no {config_file}, so it is no model (or adapter) to evaluate.")


def fingerprint_model(name: str, config_file: str) -> str:
    """
    A text that changes with the content of a model: the SHA-256 over a local folder's files, or a Hub id's commit.

    Raises:
        [`UsageError`]: if there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_model_folder(name, config_file)
        digest = hashlib.sha256()
        # What an evaluation in this folder writes is no part of the model, nor is the log of its training.
        files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern)}
        for file in sorted(file for file in files if file.name not in _NOT_OF_THE_MODEL):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return f"sha256:{digest.hexdigest()[:32]}"

    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        config = cached_file(name, config_file)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"No model {name!r}: neither a folder nor readable on the Hub ({reason})") from error
    return f"{name}@{extract_commit_hash(config, None)}"


def parse_predictions(content: bytes, source: str) -> dict[str, dict[str, Any]]:
    """
    Reads predictions by row id.

    Args:
        content (`bytes`):
            Lines of JSON objects with at least the strings `id` and `completion`; or one JSON object that maps ids to
            objects with `raw_output`, which is what the published API-Bank script writes.
        source (`str`): Name for error messages.

    Raises:
        [`UsageError`]: if a line is something else, or an id occurs twice. It names the line.
    """
    predictions: dict[str, dict[str, Any]] = {}
    # Not splitlines(), which also cuts at separators such as U+2028 that JSON allows inside a string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == 1 and (published := _parse_published(content)):
                return published
            raise UsageError(f"{source}, line {number}: not a JSON object ({error}).") from None
        if (
            number == 1
            and isinstance(record, dict)
            and "id" not in record
            and (published := _parse_published(content))
        ):
            return published
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
    if not isinstance(records, dict) or not all(isinstance(value, dict) for value in records.values()):
        return None
    if not all(isinstance(value.get("raw_output"), str) for value in records.values()):
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


class PredictionLog:
    """
    The append-only file of predictions in a run's folder; a context manager that locks the folder.

    Whole batches are appended in one write and synced, so a kill loses at most the batch in flight. A line that a kill
    cut short is dropped on the next opening.

    Args:
        folder (`Path`): The run's folder, made if absent.
        identity (`dict[str, Any]`): What completions depend on; see [`GenerationSettings.identity`].
        rows (`Sequence[EvalRow]`): The rows that are asked for now. Lines for other rows stay untouched.

    Raises:
        [`UsageError`]: on entering, if the folder belongs to a run with another identity (the error names what
            differs), is in use by another process, or holds a damaged file.
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
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
                os.fsync(file.fileno())


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """
    Indices in batches of similar length, the longest first, so that memory runs out at the start or never.

    The cut depends on `lengths` and `batch_size` alone: a resumed run forms the same batches as an uninterrupted one,
    and with them bit for bit the same completions.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate_predictions(
    rows: Sequence[EvalRow],
    settings: GenerationSettings,
    folder: str | os.PathLike,
    *,
    description: str = "Generating",
) -> dict[str, dict[str, Any]]:
    """
    Completes every prompt greedily, going on where an earlier call with the same settings was interrupted.

    Args:
        rows (`Sequence[EvalRow]`): Prompts, with unique ids.
        settings ([`GenerationSettings`]): Model and decoding.
        folder (`str` or `PathLike`): The run's folder; `predictions.jsonl` in it is kept up to date.
        description (`str`, defaults to `"Generating"`): Text beside the progress bar.

    Returns:
        `dict[str, dict]`: By row id in the order of `rows`: `id`, `completion`, `finish_reason` (`"stop"`, `"length"`
        or `None` where nothing could be generated), `completion_tokens`, `prompt_tokens`, `prompt_sha256`, `prefill`
        where the prompt ends with the start of the model's thoughts (`"<think>"`), and `error` where the prompt leaves
        no room in the context window.

    Raises:
        [`UsageError`]: if the folder belongs to other settings, the model cannot be loaded, or memory runs out.
    """
    from tqdm import tqdm

    ids = [row.id for row in rows]
    if len(set(ids)) != len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise UsageError(f"Two rows are called {twice!r}; ids must be unique.")
    with PredictionLog(Path(folder), settings.identity(), rows) as log:
        if len(log.done) < len(rows):
            from .decoding import load_decoder

            with (
                load_decoder(settings) as decoder,
                tqdm(total=len(rows), initial=len(log.done), desc=description, unit="row") as bar,
            ):
                prompts = decoder.encode([row.prompt for row in rows])
                decoder.load_model(max(len(prompt) for prompt in prompts))
                for batch in batches_by_length([len(prompt) for prompt in prompts], settings.rows_per_batch):
                    todo = [index for index in batch if rows[index].id not in log.done]
                    if not todo:
                        continue
                    # The whole batch even if a kill let part of it through: its composition is part of the numerics.
                    outputs = dict(zip(batch, decoder.complete([prompts[index] for index in batch]), strict=True))
                    log.append(
                        [
                            {
                                "id": ids[index],
                                **outputs[index],
                                **({"prefill": decoder.prefills[index]} if decoder.prefills[index] else {}),
                                "prompt_sha256": rows[index].prompt_sha256,
                            }
                            for index in todo
                        ]
                    )
                    bar.update(len(todo))
        log.finish()
        return {key: log.done[key] for key in ids}


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


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval for a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes (`float`): A tie may count as half; the interval is then a little too wide, never too narrow.
        trials (`int`): Number of independent trials.
        confidence (`float`, defaults to `0.95`): Probability that the interval covers the proportion.

    Returns:
        `tuple[float, float]`: Lower and upper bound in [0, 1]; all of it without trials.
    """
    from scipy.stats import norm

    if trials == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_results(folder: str | os.PathLike, results: dict[str, Any], scores: Iterable[dict[str, Any]]) -> Path:
    """
    Writes `results.json` (with [`versions`] added) and `scores.jsonl` (one line per row) into `folder`.

    Returns:
        `Path`: The file with the results.
    """
    folder = Path(folder)
    write_atomically(folder / SCORES_FILE, "".join(json.dumps(score) + "\n" for score in scores))
    path = folder / RESULTS_FILE
    write_atomically(path, json.dumps({**results, "versions": versions()}, indent=2, ensure_ascii=False) + "\n")
    return path
