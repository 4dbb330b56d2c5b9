"""From `trainer_state.json` to curves and to the few numbers per run that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UsageError


# What a run has spent, as the x axis of its curves.
AXES = {
    "steps": "optimizer steps",
    "tokens": "trained tokens",
    "update seconds": "update time in seconds (forward and backward passes, without generation and rewards)",
    "seconds": "training time in seconds (generation, rewards and update)",
}
# Share of the budget, at its end, over which a final value of the noisy training rewards is averaged.
FINAL_SHARE = 0.1
# A reward whose points vary by less than this share of their size is constant: float32 means are rounded.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Curves:
    """
    What a run logged.

    Args:
        rewards (`dict[str, np.ndarray]`): Mean of each reward at P points; no NaN.
        spent (`dict[str, np.ndarray]`): What the policy of each point had cost so far, per axis of `AXES`, `(P,)`.
        total (`dict[str, float]`): What the whole run cost, per axis.
        trained_rows (`float`): Share of the rollouts that carried an advantage.
        completion_length (`float`): Mean tokens of a completion in the last tenth of the steps.
        final_share (`float`): Share of a budget, at its end, over which final values are averaged; 0 takes the end.
    """

    rewards: dict[str, np.ndarray]
    spent: dict[str, np.ndarray]
    total: dict[str, float]
    trained_rows: float
    completion_length: float
    final_share: float


def read_curves(
    state: dict[str, Any], reward_names: Sequence[str], rollouts_per_step: int, *, held_out: bool
) -> Curves:
    """
    Curves of one run.

    A log entry without a new generation batch (a batch serves several updates) says nothing about rollouts: it costs
    what the last batch did and is no point of the rewards. Where a reward has no value at a point, since it scored no
    rollout there, it is interpolated between the steps that have one. A reward behind a gate is read as it was before
    the gate, so that runs with other gates or none measure the same.

    Args:
        state (`dict`): Content of `trainer_state.json`.
        reward_names (sequence of `str`): Which rewards to read.
        rollouts_per_step (`int`): Rollouts trained in an optimizer step, over all devices.
        held_out (`bool`): Whether to read the rewards of the evaluations instead of those of the training rollouts.

    Raises:
        [`UsageError`]: if the log has no value of a reward.
    """
    training = [entry for entry in state["log_history"] if "step_time" in entry]
    prefix = "eval_" if held_out else ""
    keys = {name: f"{prefix}rewards/{name}/mean" for name in reward_names}
    raw = {name: f"{prefix}gd2po/raw/{name}" for name in reward_names}
    keys |= {name: key for name, key in raw.items() if any(key in entry for entry in state["log_history"])}

    def is_point(entry: dict[str, Any]) -> bool:
        return any(key in entry for key in keys.values())

    points = [entry for entry in (state["log_history"] if held_out else training) if is_point(entry)]
    at = np.array([entry["step"] for entry in points], dtype=float)
    rewards = {name: np.array([entry.get(key) for entry in points], dtype=float) for name, key in keys.items()}
    missing = [name for name, values in rewards.items() if not training or not np.isfinite(values).any()]
    if missing:
        where = "evaluations (set `eval_strategy` and `eval_dataset`)" if held_out else "training log"
        raise UsageError(f"The {where} of a run holds no value of the reward {' or '.join(missing)}.")
    for values in rewards.values():
        known = np.isfinite(values)
        values[~known] = np.interp(at[~known], at[known], values[known])

    def carried(key: str, default: float) -> np.ndarray:
        return pd.Series([entry.get(key) for entry in training], dtype=float).ffill().fillna(default).to_numpy()

    steps = np.array([entry["step"] for entry in training], dtype=float)
    in_interval = np.diff(steps, prepend=0.0)
    # Without these metrics every rollout is trained.
    trained_rows, trained_tokens = carried("gd2po/trained_rows", 1.0), carried("gd2po/trained_tokens", 1.0)
    length = carried("completions/mean_length", 0.0)
    cost = {
        "steps": in_interval,
        "tokens": in_interval * rollouts_per_step * length * trained_tokens,
        "update seconds": in_interval * np.array([entry["gd2po/update_time"] for entry in training]),
        "seconds": in_interval * np.array([entry["step_time"] for entry in training]),
    }
    after = {axis: np.cumsum(increments) for axis, increments in cost.items()}
    if held_out:
        spent = {axis: np.interp(at, np.append(0.0, steps), np.append(0.0, after[axis])) for axis in cost}
    else:
        # An entry averages the rollouts of its interval, which were sampled before the updates of their steps.
        middle = (in_interval - 1) / (2 * in_interval)
        sampled = [is_point(entry) for entry in training]
        spent = {axis: (after[axis] - increments * (1 - middle))[sampled] for axis, increments in cost.items()}
    last = steps > steps[-1] * (1 - FINAL_SHARE)
    return Curves(
        rewards=rewards,
        spent=spent,
        total={axis: float(values[-1]) for axis, values in after.items()},
        trained_rows=float(np.average(trained_rows, weights=in_interval)),
        completion_length=float(length[last].mean()),
        final_share=0.0 if held_out else FINAL_SHARE,
    )


def mean_between(spent: np.ndarray, values: np.ndarray, start: float, end: float) -> float:
    """Mean of a curve over [start, end]: its area by the trapezoid rule, divided by the width."""
    if end <= start:
        return float(np.interp(end, spent, values))
    inside = spent[(spent > start) & (spent < end)]
    grid = np.concatenate([[start], inside, [end]])
    heights = np.interp(grid, spent, values)
    return float((np.diff(grid) * (heights[1:] + heights[:-1]) / 2).sum() / (end - start))


def observed_ranges(runs: Sequence[Curves]) -> dict[str, tuple[float, float]]:
    """Lowest and highest point of each reward over all runs; one and the same if they differ by rounding alone."""
    ranges = {}
    for name in runs[0].rewards if runs else ():
        values = np.concatenate([run.rewards[name] for run in runs])
        low, high = float(values.min()), float(values.max())
        ranges[name] = (low, high if high - low > ROUNDING * max(abs(low), abs(high)) else low)
    return ranges


def counted_rewards(ranges: dict[str, tuple[float, float]], weights: dict[str, float]) -> list[str]:
    """The rewards that `sum` and `worst` are made of: those with a weight and a range."""
    return [name for name, (low, high) in ranges.items() if weights[name] != 0 and high > low]


def normalized(
    rewards: dict[str, np.ndarray], ranges: dict[str, tuple[float, float]], weights: dict[str, float]
) -> dict[str, np.ndarray]:
    """
    Each of the `counted_rewards` as a share of its range, 1 being best.

    A reward of negative weight is best where it is lowest. One of weight 0 is only watched, and one without any range,
    being the same in all runs, is neither good nor bad: both are left out.
    """
    shares = {}
    for name in counted_rewards(ranges, weights):
        low, high = ranges[name]
        share = (rewards[name] - low) / (high - low)
        shares[name] = share if weights[name] > 0 else 1 - share
    return shares


def quantity_curves(
    run: Curves, ranges: dict[str, tuple[float, float]], weights: dict[str, float]
) -> dict[str, np.ndarray]:
    """
    The curves that are compared: every reward, the sum of the normalized rewards, and the worst of them.

    Sum and worst are 0 throughout if no reward counts.
    """
    shares = np.stack(list(normalized(run.rewards, ranges, weights).values()) or [np.zeros_like(run.spent["steps"])])
    return {**run.rewards, "sum": shares.sum(0), "worst": shares.min(0)}


def quantity_values(
    run: Curves, ranges: dict[str, tuple[float, float]], weights: dict[str, float], budgets: dict[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """
    `{axis: {"final" | "area": {quantity: value}}}` of one run.

    `final` is the mean over the last `final_share` of the axis's budget, `area` the mean over the whole of it. The
    final `worst` is the lowest of the final normalized rewards.
    """
    curves = quantity_curves(run, ranges, weights)
    result = {}
    for axis, budget in budgets.items():
        spent, start = run.spent[axis], budget * (1 - run.final_share)
        final = {name: mean_between(spent, curve, start, budget) for name, curve in curves.items()}
        ends = {name: np.array(final[name]) for name in run.rewards}
        final["worst"] = float(min(normalized(ends, ranges, weights).values(), default=0.0))
        area = {name: mean_between(spent, curve, 0.0, budget) for name, curve in curves.items()}
        result[axis] = {"final": final, "area": area}
    return result
