"""Numbers that change over the optimizer steps of a training: reward weights, and options of rewards."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UsageError
from .user_input import as_mapping, is_number


KINDS = ("constant", "linear", "steps")
KEY = "reward_weight_schedules"


@dataclass(frozen=True)
class Schedule:
    """
    A number for every step, given at some of them; beyond the last of these it stays what it is there.

    Args:
        kind (`str`): `"linear"` between the points, or `"steps"`: each value holds until the next point.
        points (tuple of `tuple[int, float]`): Step and value, by rising step.
    """

    kind: str
    points: tuple[tuple[int, float], ...]

    def at(self, step: float) -> float:
        """The value at `step`."""
        steps, values = zip(*self.points, strict=True)
        if self.kind == "linear":
            return float(np.interp(step, steps, values))
        return values[max(bisect_right(steps, step) - 1, 0)]


def read_weight_schedules(value: Any) -> dict[str, Schedule]:
    """
    The schedules of `reward_weight_schedules`, by reward.

    Args:
        value (mapping, JSON text or `None`):
            Names of rewards to a number (constant), `{"linear": {step: factor, ...}}` or
            `{"steps": {step: factor, ...}}`; `None` is no schedule.

    Raises:
        [`UsageError`]: which names the key and the reward.
    """
    schedules = as_mapping(KEY, value)
    return {name: _read_schedule(name, given) for name, given in schedules.items() if given is not None}


def _read_schedule(name: Any, given: Any) -> Schedule:
    if not isinstance(given, Mapping):
        given = {"constant": given}
    kind, points = next(iter(given.items()), (None, None))
    if len(given) != 1 or kind not in KINDS:
        raise _error(name, given, "must be a number, {linear: {0: 0.0, 100: 1.0}} or {steps: {0: 1.0, 100: 0.5}}")
    if kind == "constant":
        return Schedule("steps", ((0, _factor(name, points)),))
    if not isinstance(points, Mapping) or len(points) < 2:
        raise _error(name, given, f"`{kind}` maps two or more optimizer steps to factors")
    # JSON, and so a command line, has text for keys.
    by_step = {_step(name, step): _factor(name, factor) for step, factor in points.items()}
    if len(by_step) < len(points) or 0 not in by_step:
        raise _error(name, given, "must give each optimizer step once, and step 0, the first, among them")
    return Schedule(kind, tuple(sorted(by_step.items())))


def _step(name: Any, step: Any) -> int:
    if isinstance(step, bool) or not str(step).isdecimal():
        raise _error(name, step, "as an optimizer step must be a whole number of at least 0")
    return int(step)


def _factor(name: Any, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1e30:
        raise _error(
            name, value, "as a factor must be a finite number of at least 0; the sign belongs to `reward_weights`"
        )
    return float(value)


def _error(name: Any, value: Any, remedy: str) -> UsageError:
    return UsageError(f"`{KEY}` of the reward {name!r} has {value!r}, which {remedy}.")


def check_weight_schedules(
    schedules: Mapping[str, Schedule], names: Sequence[str], weights: Sequence[float] | None
) -> None:
    """
    Refuse schedules of rewards that are not there, and a step at which no reward counts.

    Args:
        schedules (mapping of `str` to [`Schedule`]): By reward.
        names (sequence of `str`): The rewards.
        weights (sequence of `float` or `None`): Their `reward_weights`; `None` is 1 each.

    Raises:
        [`UsageError`]: which names the key and the reward or the step.
    """
    for name in schedules:
        if name not in names:
            raise UsageError(f"`{KEY}` has {name!r}, which is none of the rewards ({', '.join(names)}).")
    for step in sorted({step for schedule in schedules.values() for step, _ in schedule.points}):
        if not any(weights_at(step, schedules, names, weights)):
            raise UsageError(f"`{KEY}`: at optimizer step {step} all rewards have weight 0, so nothing is learned.")


def weights_at(
    step: int, schedules: Mapping[str, Schedule], names: Sequence[str], weights: Sequence[float] | None
) -> list[float]:
    """The weights of the rewards `names` at an optimizer step: `weights` (`None` is 1 each) times their factors."""
    factors = [schedules[name].at(step) if name in schedules else 1.0 for name in names]
    return [weight * factor for weight, factor in zip(weights or [1.0] * len(names), factors, strict=True)]
