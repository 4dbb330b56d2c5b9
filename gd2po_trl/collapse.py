"""The sign of a filter that stops a reward from being learned: it falls, and what would raise it is dropped."""

import math
from collections import deque
from collections.abc import Sequence

import torch

from .advantages import SIGN_EPS, AdvantageBreakdown


# Generation batches that a fall is judged over.
WINDOW = 20
# The trend of a falling reward is this many standard errors below 0. Batches have other prompts each, so a reward's
# mean goes up and down; at this distance chance explains 1 of 2,500 windows.
STEEPNESS = 4.0
# Share of the rollouts that would raise the reward above which it counts as kept from learning.
DROPPED_SHARE = 0.5


def collapse_statistics(
    rewards: torch.Tensor, breakdown: AdvantageBreakdown, reward_weights: torch.Tensor
) -> torch.Tensor:
    """
    What [`CollapseWatch`] needs to know of a generation batch, without waiting for the device.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Rewards, NaN where a function did not score the rollout.
        breakdown ([`AdvantageBreakdown`]):
            What [`compute_advantages`] made of them.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Weights; a reward of negative weight is meant to fall, and one of weight 0 is nobody's aim.

    Returns:
        `torch.Tensor` of shape `(3, K)`, float32: mean of each reward, its sign turned where the weight is negative
        (NaN where nothing was scored or the weight is 0), the rollouts that would raise it, and those of them that the
        filter dropped.
    """
    raising = breakdown.per_reward > SIGN_EPS
    dropped = raising & ~breakdown.kept.unsqueeze(1)
    means = torch.where(reward_weights == 0, torch.nan, rewards.nanmean(0) * reward_weights.sign())
    return torch.stack([means.float(), raising.sum(0).float(), dropped.sum(0).float()])


class CollapseWatch:
    """
    Notices, once per run, a reward whose mean falls over `window` generation batches while most of the rollouts that
    would raise it are dropped. It remembers the last batches only, so that a resumed run starts to watch anew.

    Args:
        reward_names (sequence of `str`): Names of the K rewards.
        window (`int`, *optional*, defaults to `20`): Generation batches that a fall is judged over.
    """

    def __init__(self, reward_names: Sequence[str], window: int = WINDOW):
        self.reward_names = list(reward_names)
        self.window = window
        self.batches: deque[Sequence[Sequence[float]]] = deque(maxlen=window)
        self.has_warned = False

    def update(self, statistics: Sequence[Sequence[float]]) -> str | None:
        """A warning if the signature shows after this batch's [`collapse_statistics`], as lists; else `None`."""
        self.batches.append(statistics)
        if self.has_warned or len(self.batches) < self.window:
            return None
        means, raising, dropped = zip(*self.batches, strict=True)
        for index, name in enumerate(self.reward_names):
            values = [batch[index] for batch in means]
            would_raise = sum(batch[index] for batch in raising)
            share = sum(batch[index] for batch in dropped) / max(would_raise, 1)
            if share > DROPPED_SHARE and falls(values):
                self.has_warned = True
                size = len(values) // 4
                before, after = math.fsum(values[:size]) / size, math.fsum(values[-size:]) / size
                return (
                    f"The reward '{name}' falls: its mean went from {before:.3g} to {after:.3g} over the last "
                    f"{len(values)} generation batches, while {share:.0%} of the rollouts that would have raised it "
                    "were dropped because another reward disagrees. A reward cannot be learned from what is dropped: "
                    "train with `conflict_filter: null` (method gdpo), and with `update_share` if the update is to "
                    "stay cheap."
                )
        return None


def falls(values: Sequence[float]) -> bool:
    """Whether the least-squares trend of `values` is more than `STEEPNESS` standard errors below 0."""
    if len(values) < 3 or any(math.isnan(value) for value in values):
        return False
    middle = (len(values) - 1) / 2
    mean = math.fsum(values) / len(values)
    spread = math.fsum((index - middle) ** 2 for index in range(len(values)))
    slope = math.fsum((index - middle) * value for index, value in enumerate(values)) / spread
    residual = math.fsum((value - mean - slope * (index - middle)) ** 2 for index, value in enumerate(values))
    error = math.sqrt(residual / (len(values) - 2) / spread)
    # The last term is rounding: a constant reward does not fall.
    return -slope > STEEPNESS * error + 1e-9 * max(map(abs, values))
