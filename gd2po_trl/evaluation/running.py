"""Completions for all rows, going on where a killed run stopped, and the results written beside them."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .decoding import batches_by_length, load_decoder
from .predictions import RESULTS_FILE, SCORES_FILE, EvalRow, PredictionLog, write_atomically
from .settings import GenerationSettings


_REPORTED_PACKAGES = ("gd2po-trl", "torch", "transformers", "trl", "peft", "vllm")


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
                    for index in todo:
                        if decoder.prefills[index]:
                            outputs[index]["prefill"] = decoder.prefills[index]
                        outputs[index]["prompt_sha256"] = rows[index].prompt_sha256
                    log.append([{"id": ids[index], **outputs[index]} for index in todo])
                    bar.update(len(todo))
        log.finish()
        return {key: log.done[key] for key in ids}


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
    """Writes `results.json`, with [`versions`], whose path it returns, and `scores.jsonl` (one line per row)."""
    folder = Path(folder)
    write_atomically(folder / SCORES_FILE, "".join(json.dumps(score) + "\n" for score in scores))
    path = folder / RESULTS_FILE
    write_atomically(path, json.dumps({**results, "versions": versions()}, indent=2, ensure_ascii=False) + "\n")
    return path
