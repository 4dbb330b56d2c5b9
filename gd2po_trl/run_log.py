"""The files that a training run writes: its log, its table of completions and its checkpoints."""

import json
import logging
import math
import re
import zipfile
from pathlib import Path
from typing import Any

from .errors import UsageError


logger = logging.getLogger(__name__)

LogHistory = list[dict[str, Any]]
STATE_FILE = "trainer_state.json"
# Share of the log entries, at either end, over which the noisy rewards of training are averaged.
END_SHARE = 0.1
# Columns of TRL's completions table (`image` is for trackers), and the prefix of this package's own columns.
TABLE_COLUMNS = ("step", "prompt", "completion", "advantage", "image")
TABLE_PREFIX = "gd2po_"
# Folders of sharded weights in a checkpoint: of DeepSpeed, and of FSDP with a sharded state dict.
ENGINE_FOLDERS = ("global_step", "pytorch_model_fsdp", "optimizer_")


def is_table_column(name: str) -> bool:
    """Whether the completions table has a column `name` already, so that a reward of this name would replace it."""
    return name in TABLE_COLUMNS or name.startswith(TABLE_PREFIX)


# The log


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """Content of the `trainer_state.json` in `folder`, a run's or a checkpoint's; `None` if there is no whole one."""
    try:
        state = json.loads((Path(folder) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("log_history"), list) else None


def read_log(folder: str | Path) -> LogHistory:
    """
    The log history that a training run left in its output folder.

    Raises:
        [`UsageError`]: if there is none.
    """
    state = read_state(folder)
    if state is None:
        raise UsageError(f"There is no log history in '{Path(folder) / STATE_FILE}': run the training first.")
    return state["log_history"]


def reward_names(log: LogHistory) -> list[str]:
    """Names of the rewards in a log, in their order in the entries."""
    keys = dict.fromkeys(key for entry in log for key in entry)
    matches = (re.fullmatch(r"rewards/(.+)/mean", key) for key in keys)
    return [match[1] for match in matches if match]


def series(log: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one logged number."""
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def held_out_change(log: LogHistory) -> dict[str, tuple[float, float]]:
    """
    Mean of each reward on the held-out prompts, at the first evaluation and at the last.

    Raises:
        [`UsageError`]: if the log has fewer than two evaluations.
    """
    values = {name: series(log, f"eval_rewards/{name}/mean")[1] for name in reward_names(log)}
    if any(len(means) < 2 for means in values.values()):
        raise UsageError("The log has no evaluation before and after training: set eval_on_start and eval_steps.")
    return {name: (means[0], means[-1]) for name, means in values.items()}


def training_change(log: LogHistory) -> dict[str, tuple[float, float]]:
    """Mean of each reward over the first and over the last tenth of the training log."""
    values = {name: series(log, f"rewards/{name}/mean")[1] for name in reward_names(log)}
    return {name: ends(means) for name, means in values.items() if means}


def ends(values: list[float]) -> tuple[float, float]:
    """Mean over the first and over the last tenth of `values`, at least one of them."""
    count = max(round(len(values) * END_SHARE), 1)
    return math.fsum(values[:count]) / count, math.fsum(values[-count:]) / count


# Checkpoints


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints in the output folder of a run, newest first."""
    numbers = {path: path.name.rpartition("-")[2] for path in Path(folder).glob("checkpoint-*")}
    return sorted((path for path in numbers if numbers[path].isdigit()), key=lambda p: int(numbers[p]), reverse=True)


def checkpoint_to_resume(resume: str | bool | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume (`str`, `bool` or `None`):
            A folder; or `True`, `"true"` or `"latest"` for the newest intact checkpoint in `output_dir`; or `None`,
            `False` or `"false"` for a fresh start.
        output_dir (`str` or `Path`):
            Where the run writes its checkpoints.

    Returns:
        Folder of the checkpoint; `None` for a fresh start, which is also what `"latest"` means before the first
        checkpoint.

    Raises:
        [`UsageError`]: if a folder was named that holds no intact checkpoint, or if a fresh start would find
            checkpoints in `output_dir`: the run would take them for its own, and delete and resume the wrong ones.
    """
    text, found = str(resume).lower(), checkpoints_of(output_dir)
    if text in ("none", "false", ""):
        if found:
            raise UsageError(
                f"`output_dir` '{output_dir}' holds checkpoints of another run. Give another `output_dir`, delete "
                "them, or go on from them with `resume_from_checkpoint: latest`."
            )
        return None
    if text not in ("true", "latest"):
        damage = find_damage(Path(str(resume)))
        if damage is not None:
            raise UsageError(f"Cannot resume from '{resume}': {damage}. `resume_from_checkpoint: latest` finds one.")
        return str(resume)
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        logger.warning(f"Skipping checkpoint '{checkpoint}', which was not written to its end: {damage}.")
    logger.warning(f"No intact checkpoint in '{output_dir}'; starting from the beginning.")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or truncated in a checkpoint of transformers' `Trainer`, or `None` if it is intact."""
    from safetensors import SafetensorError, safe_open

    if not checkpoint.is_dir():
        return "there is no such folder"
    # Sharded engines check their own folders when they load them.
    is_sharded = any(entry.is_dir() and entry.name.startswith(ENGINE_FOLDERS) for entry in checkpoint.iterdir())
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights and not is_sharded:
        return "it holds no weights" if (checkpoint / STATE_FILE).is_file() else f"{STATE_FILE} is missing"
    needed: list[tuple[str, ...]] = [(STATE_FILE,)]
    if not is_sharded:  # FSDP with a full state dict writes optimizer.bin
        needed += [("optimizer.pt", "optimizer.bin"), ("scheduler.pt",)]
    try:
        for file in checkpoint.glob("*.safetensors.index.json"):
            needed += [(shard,) for shard in sorted(set(json.loads(file.read_bytes())["weight_map"].values()))]
        for names in needed:
            if not any((checkpoint / name).is_file() for name in names):
                return f"{names[0]} is missing"
        file = checkpoint / STATE_FILE
        json.loads(file.read_bytes())
        for file in weights:
            with safe_open(file, "pt"):  # reads the header, and compares the sizes in it with the file's
                pass
    except (ValueError, KeyError, SafetensorError):
        return f"{file.name} is truncated"
    for pattern in ("optimizer.pt", "scheduler.pt", "*.bin", "rng_state*.pth"):
        for file in checkpoint.glob(pattern):
            if not zipfile.is_zipfile(file):
                return f"{file.name} is truncated"
    return None
