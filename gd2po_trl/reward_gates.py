"""Gates: a reward counts only where another one meets a threshold (conditioned rewards of GDPO, arXiv 2601.05242)."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


CLOSED_GATE_REWARDS = ("zero", "unscored")
OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*([^<>=!]*[^<>=!\s])\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Condition:
    """
    What opens a gate.

    Args:
        reward (`str`): Name of the reward that is compared.
        operator (`str`): One of `OPERATORS`.
        threshold (`float`): What it is compared with.
    """

    reward: str
    operator: str
    threshold: float


def parse_gates(gates: Mapping[str, Any]) -> dict[str, list[Condition]]:
    """
    The conditions of each gated reward. `None` is no gate, so that a recipe can drop that of its base.

    Args:
        gates (mapping of `str` to `str` or list of `str`):
            Such as `{"length": "correctness >= 3"}`. Of several conditions all have to hold.

    Raises:
        `ValueError`: for what is no comparison of a reward with a number.
    """
    parsed: dict[str, list[Condition]] = {}
    for name, texts in gates.items():
        if texts is None:
            continue
        parsed[name] = []
        for text in texts if isinstance(texts, (list, tuple)) and texts else [texts]:
            match = _CONDITION.fullmatch(text) if isinstance(text, str) else None
            if match is None or not math.isfinite(float(match[3])):
                raise ValueError(
                    f"`reward_gates` has {name}: {text!r}; a gate compares one reward with a number, such as "
                    f"'correctness >= 3' (operators: {', '.join(OPERATORS)}). Several conditions are a list."
                )
            parsed[name].append(Condition(match[1], match[2], float(match[3])))
    return parsed


def check_gates(gates: Mapping[str, Any], names: Sequence[str]) -> None:
    """
    Refuse gates of or on rewards that a run does not have exactly once.

    Args:
        gates (mapping): As for [`parse_gates`].
        names (sequence of `str`): Names of the rewards of the run.

    Raises:
        `ValueError`: for the first such name.
    """
    for name, conditions in parse_gates(gates).items():
        for reward in (name, *(condition.reward for condition in conditions)):
            if names.count(reward) != 1:
                problem = "which is the name of several rewards" if reward in names else "which is none of the rewards"
                raise ValueError(f"`reward_gates` names {reward!r}, {problem} ({', '.join(names)}).")


class RewardGates:
    """
    The gates of a run.

    All conditions are judged on the rewards as the functions returned them, so that the order of gates does not matter
    and a gate may depend on a gated reward. An unscored reward meets no condition, and stays unscored behind a gate.

    Args:
        gates (mapping or `None`): As for [`parse_gates`]; `None` for no gate.
        names (sequence of `str` of length K): Names of the rewards.
        closed (`str`): `"zero"` or `"unscored"`: what a reward is worth behind a closed gate.

    Raises:
        `ValueError`: for a name that is none of the rewards, or an unreadable condition.
    """

    def __init__(self, gates: Mapping[str, Any] | None, names: Sequence[str], closed: str):
        check_gates(gates or {}, list(names))
        self.closed_value = 0.0 if closed == "zero" else math.nan
        self._gates = {
            names.index(name): [
                (names.index(one.reward), OPERATORS[one.operator], one.threshold) for one in conditions
            ]
            for name, conditions in parse_gates(gates or {}).items()
        }
        self.names = [names[index] for index in self._gates]

    def __bool__(self) -> bool:
        return bool(self._gates)

    def is_open(self, rewards: torch.Tensor) -> torch.Tensor:
        """Whether each gate is open: boolean, `(B, number of gates)`, for rewards of shape `(B, K)`."""
        columns = []
        for conditions in self._gates.values():
            is_open = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
            for index, compare, threshold in conditions:
                # Both as float32, in which TRL keeps rewards: as float64 a reward of 0.7 would be below 0.7.
                values = rewards[:, index].float()
                is_open &= compare(values, torch.tensor(threshold, dtype=torch.float32)) & ~values.isnan()
            columns.append(is_open)
        return torch.stack(columns, dim=1)

    def apply(self, rewards: torch.Tensor) -> torch.Tensor:
        """The rewards that count, of shape `(B, K)`, NaN where there is none; `rewards` is left as it is."""
        if not self._gates:
            return rewards
        gated, columns = rewards.clone(), list(self._gates)
        before = rewards[:, columns]
        gated[:, columns] = before.masked_fill(~self.is_open(rewards) & ~before.isnan(), self.closed_value)
        return gated

    def metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        """Per gated reward the share of rollouts for which its gate is open, and its mean before the gate."""
        if not self._gates:
            return {}
        shares, means = self.is_open(rewards).float().mean(0), rewards[:, list(self._gates)].nanmean(0)
        values = iter(torch.cat([shares, means.to(shares)]).tolist())
        keys = [*(f"gd2po/gate_open/{name}" for name in self.names), *(f"gd2po/raw/{name}" for name in self.names)]
        return {key: value for key, value in zip(keys, values, strict=True) if not math.isnan(value)}

    def raw_columns(self, rewards: torch.Tensor) -> dict[str, list[float]]:
        """Columns of the completions table: what each gated reward was before its gate."""
        values = rewards[:, list(self._gates)].T.tolist()
        return {f"gd2po_raw_{name}": column for name, column in zip(self.names, values, strict=True)}
