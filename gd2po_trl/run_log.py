"""What a training run left in `trainer_state.json`, as series of numbers."""

import json
import math
from pathlib import Path
from typing import Any

from .errors import UsageError


LogHistory = list[dict[str, Any]]
# Share of the log entries, at either end, over which the noisy rewards of training are averaged.
END_SHARE = 0.1


def read_log(folder: str | Path) -> LogHistory:
    """
    The log history that a training run left in its output folder.

    Raises:
        [`UsageError`]: if there is none.
    """
    path = Path(folder) / "trainer_state.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"There is no log history in '{path}': run the training first ({error}).") from error


def reward_names(log: LogHistory) -> list[str]:
    """Names of the rewards in a log, in their order in the entries."""
    keys = dict.fromkeys(key for entry in log for key in entry)
    return [
        key.removeprefix("rewards/").removesuffix("/mean")
        for key in keys
        if key.startswith("rewards/") and key.endswith("/mean")
    ]


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
    changes = {}
    for name in reward_names(log):
        _, values = series(log, f"eval_rewards/{name}/mean")
        if len(values) < 2:
            raise UsageError("The log has no evaluation before and after training: set eval_on_start and eval_steps.")
        changes[name] = values[0], values[-1]
    return changes


def training_change(log: LogHistory) -> dict[str, tuple[float, float]]:
    """Mean of each reward, and of the conflict ratio, over the first and the last tenth of the training log."""
    keys = {name: f"rewards/{name}/mean" for name in reward_names(log)}
    changes = {}
    for name, key in keys.items():
        _, values = series(log, key)
        if values:
            changes[name] = ends(values)
    return changes


def ends(values: list[float]) -> tuple[float, float]:
    """Mean over the first and over the last tenth of `values`, at least one of them."""
    count = max(round(len(values) * END_SHARE), 1)
    return math.fsum(values[:count]) / count, math.fsum(values[-count:]) / count
