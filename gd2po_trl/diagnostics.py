"""How far the rewards of a generation batch disagree: statistics for the trainer and for `gd2po analyze`."""

import math
from collections import deque
from collections.abc import Sequence
from itertools import combinations

import torch

from .advantages import SIGN_EPS, AdvantageBreakdown, survives_filter


def pair_name(first: str, second: str) -> str:
    """How a pair of rewards is called in metric names."""
    return f"{first}_vs_{second}"


def pair_conflicts(per_reward: torch.Tensor) -> torch.Tensor:
    """
    For every pair of rewards, which rollouts they push in opposite directions.

    Args:
        per_reward (`torch.Tensor` of shape `(B, K)`):
            Advantage of each rollout under each reward, as in [`AdvantageBreakdown`].

    Returns:
        `torch.Tensor` of shape `(B, K * (K - 1) / 2)`, bool, pairs in the order of `itertools.combinations`.
    """
    sign = (per_reward > SIGN_EPS).to(torch.int8) - (per_reward < -SIGN_EPS).to(torch.int8)
    pairs = list(combinations(range(per_reward.shape[1]), 2))
    first = torch.tensor([pair[0] for pair in pairs], dtype=torch.long, device=per_reward.device)
    second = torch.tensor([pair[1] for pair in pairs], dtype=torch.long, device=per_reward.device)
    return (sign[:, first] * sign[:, second]) < 0


def conflict_metrics(
    rewards: torch.Tensor,
    breakdown: AdvantageBreakdown,
    reward_names: Sequence[str],
    num_generations: int,
    snr_threshold: float = 0.8,
) -> dict[str, torch.Tensor]:
    """
    The conflict statistics of a generation batch as 0-dim tensors on its device; nothing waits for the device.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Rewards, NaN where a function did not score the rollout.
        breakdown ([`AdvantageBreakdown`]):
            What [`compute_advantages`] made of them.
        reward_names (sequence of `str`):
            Names of the K rewards.
        num_generations (`int`):
            Rollouts per group.
        snr_threshold (`float`, *optional*, defaults to `0.8`):
            Below which agreement a conflict counts as true, whatever the filter.

    Returns:
        `dict` with, in this order (ratios are over the rollouts that some reward scored; NaN where there is nothing to
        average):

        - `conflict_ratio`: share of rollouts on which the rewards disagree in sign
        - `kept_ratio`: share that the filter kept
        - `true_conflict_ratio`: share of rollouts that conflict with an |agreement| below `snr_threshold`
        - `consensus/mean`, `consensus/std`, `consensus/min`, `consensus/max`: kept share over the groups with a scored
          rollout; the standard deviation is that of the population
        - `conflict_agreement`: mean of |agreement| over the conflicting rollouts
        - `conflict_agreement/signed_mean`, `conflict_agreement/median`: mean and lower median of the agreement itself
        - `true_conflict_ratio/of_conflicts`: share of the conflicting rollouts whose conflict is true
        - `cancellation`: `1 - sum |sum_k A| / sum |A|`, the share of the normalized advantages that cancels
        - `frac_groups_without_signal`: share of groups in which every reward has zero standard deviation
        - `conflict_ratio/<a>_vs_<b>` for every pair of rewards
    """
    scored = ~torch.isnan(rewards).all(1)
    num_scored = scored.sum()

    def mean_over(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return (values * where).sum(0) / where.sum()

    consensus = breakdown.consensus.view(-1, num_generations)[:, 0]
    group_scored = scored.view(-1, num_generations).any(1)
    push = breakdown.per_reward.abs()
    group_signal = push.amax(1).view(-1, num_generations).amax(1) > SIGN_EPS
    nan = torch.full_like(consensus, torch.nan)
    any_scored = group_scored.any()
    group_consensus = torch.where(group_scored, consensus, nan)
    conflict, agreement = breakdown.conflict, breakdown.agreement
    true_conflict = ~survives_filter(conflict, agreement, "snr", snr_threshold)
    metrics = {
        "conflict_ratio": conflict.sum() / num_scored,
        "kept_ratio": breakdown.kept.sum() / num_scored,
        "true_conflict_ratio": true_conflict.sum() / num_scored,
        "consensus/mean": group_consensus.nanmean(),
        "consensus/std": (group_consensus - group_consensus.nanmean()).square().nanmean().sqrt(),
        "consensus/min": torch.where(any_scored, torch.where(group_scored, consensus, torch.inf).amin(), nan[0]),
        "consensus/max": torch.where(any_scored, torch.where(group_scored, consensus, -torch.inf).amax(), nan[0]),
        "conflict_agreement": mean_over(agreement.abs(), conflict),
        "conflict_agreement/signed_mean": mean_over(agreement, conflict),
        "conflict_agreement/median": torch.where(conflict, agreement, torch.nan).nanmedian(),
        "true_conflict_ratio/of_conflicts": true_conflict.sum() / conflict.sum(),
        # Clamped, since rounding can leave it just below zero.
        "cancellation": (1 - breakdown.per_reward.sum(1).abs().sum() / push.sum()).clamp(min=0.0),
        "frac_groups_without_signal": (~group_signal).float().mean(),
    }
    if len(reward_names) > 1:
        # A rollout without a token conflicts with nothing.
        pairs = pair_conflicts(breakdown.per_reward) & breakdown.conflict.unsqueeze(1)
        pair_ratios = pairs.sum(0) / num_scored
        for (first, second), ratio in zip(combinations(reward_names, 2), pair_ratios.unbind(), strict=True):
            metrics[f"conflict_ratio/{pair_name(first, second)}"] = ratio
    return metrics


def batch_numbers(
    rewards: torch.Tensor,
    breakdown: AdvantageBreakdown,
    reward_names: Sequence[str],
    num_generations: int,
    snr_threshold: float,
    token_counts: torch.Tensor,
    reward_weights: torch.Tensor,
) -> tuple[dict[str, float], list[list[float]]]:
    """
    All that is logged and watched of a generation batch of B rollouts under K rewards, as numbers.

    Args:
        rewards, breakdown, reward_names, num_generations, snr_threshold:
            As for [`conflict_metrics`].
        token_counts (`torch.Tensor` of shape `(B,)`):
            Tokens to train of each rollout.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            As for [`collapse_statistics`].

    Returns:
        `tuple` of [`conflict_metrics`], with `has_gradient` (0 or 1) and `masked_ratio`, the share of rollouts without
        a token to train; and of [`collapse_statistics`].
    """
    metrics = conflict_metrics(rewards, breakdown, reward_names, num_generations, snr_threshold)
    metrics["has_gradient"] = (breakdown.advantages != 0).any()
    metrics["masked_ratio"] = (token_counts == 0).float().mean()
    signs = collapse_statistics(rewards, breakdown, reward_weights)
    # The only wait for the device: all numbers in one copy.
    numbers = torch.cat([torch.stack([value.float() for value in metrics.values()]), signs.flatten()]).tolist()
    values, rest = numbers[: len(metrics)], numbers[len(metrics) :]
    return dict(zip(metrics, values, strict=True)), torch.tensor(rest).view(3, -1).tolist()


# What is wrong with a batch: each is said at the first such batch in a row, and rarely then.
SAID_AT = (1, 10, 100, 1000)


def infinite_rewards(rewards: torch.Tensor, names: Sequence[str]) -> str | None:
    """The error of a batch of rewards (B, K) with infinite ones, the same on every process; `None` without any."""
    infinite = torch.isinf(rewards).sum(0).tolist()
    if not any(infinite):
        return None
    culprits = [name for name, count in zip(names, infinite, strict=True) if count]
    return (
        f"The reward function{'s' if len(culprits) > 1 else ''} {', '.join(map(repr, culprits))} returned "
        f"{sum(infinite):.0f} infinite rewards in a batch of {len(rewards)}. Return a finite number, or None "
        "for a completion that cannot be scored."
    )


class SilentRewards:
    """Notices a reward of `names` that scores nothing: it counts as if it were not there, its mean is nan."""

    def __init__(self, names: Sequence[str]):
        self._names, self._batches = list(names), [0] * len(names)

    def after_batch(self, rewards: torch.Tensor) -> list[str]:
        """
        What to say after a generation batch with rewards (B, K), nan where there is none: at the first one in a row
        that a reward does not score, and rarely then.
        """
        messages = []
        for index, is_silent in enumerate(torch.isnan(rewards).all(0).tolist()):
            count = self._batches[index] = self._batches[index] + 1 if is_silent else 0
            if count in SAID_AT:
                messages.append(
                    f"The reward '{self._names[index]}' scored no completion of {count} generation batch(es) in a "
                    "row: it returned None or nan for each, and counts as if it were not there."
                )
        return messages


class GradientWatch:
    """Notices generation batches in which all advantages are zero."""

    def __init__(self) -> None:
        self._batches = 0

    def after_batch(
        self, has_gradient: bool, conflict_ratio: float, masked_ratio: float, masks_truncated: bool
    ) -> str | None:
        """
        A warning with the likely cause, or `None`.

        Args:
            has_gradient (`bool`): Whether an advantage of the batch is not zero.
            conflict_ratio (`float`): Share of its rollouts on which the rewards conflict; NaN if none is scored.
            masked_ratio (`float`): Share of its rollouts without a token to train.
            masks_truncated (`bool`): Whether completions that were cut off are masked.
        """
        self._batches = 0 if has_gradient else self._batches + 1
        if self._batches not in SAID_AT:
            return None
        last = "generation batch, so it" if self._batches == 1 else f"{self._batches} generation batches, so they"
        parts = [f"All advantages were zero in the last {last} gave no gradient."]
        if masked_ratio < 1 and math.isnan(conflict_ratio):
            parts.append("No reward scored any completion.")
        elif masked_ratio < 1:
            parts.append(
                f"The rewards disagree on {conflict_ratio:.0%} of the rollouts. Where they do, "
                "`conflict_filter='snr'` with a low `snr_threshold` keeps more of them; where they do not, all "
                "rollouts of a prompt have the same rewards."
            )
        if masks_truncated and masked_ratio > 0:
            parts.append(
                f"{'All' if masked_ratio == 1 else f'{masked_ratio:.0%}'} of the completions were cut off, and "
                "`mask_truncated_completions` masks them: raise `max_completion_length`, or turn "
                "`mask_truncated_completions` off."
            )
        elif masked_ratio == 1:
            parts.append("No completion has a token to train.")
        return " ".join(parts)


# A reward that falls because a filter drops what would raise it

# Generation batches that a fall is judged over.
WINDOW = 20
# The trend of a falling reward is this many standard errors below 0. Batches have other prompts each, so a reward's
# mean goes up and down; at this distance chance explains 1 of 2,500 windows. A long run has many windows, so that one
# more standard error is asked for at ten times as many batches: of rewards that vary by chance alone, 2.5 % then fall
# in some window of 1,000 batches, and 25 % would without.
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
            Weights; a reward of negative weight is meant to fall, and one of weight 0 is not trained.

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
        self.batches_seen = 0
        self.has_warned = False

    def update(self, statistics: Sequence[Sequence[float]]) -> str | None:
        """A warning if the signature shows after this batch's [`collapse_statistics`], as lists; else `None`."""
        self.batches.append(statistics)
        self.batches_seen += 1
        if self.has_warned or len(self.batches) < self.window:
            return None
        means, raising, dropped = zip(*self.batches, strict=True)
        steepness = STEEPNESS + math.log10(self.batches_seen / self.window)
        for index, name in enumerate(self.reward_names):
            values = [batch[index] for batch in means]
            would_raise = sum(batch[index] for batch in raising)
            share = sum(batch[index] for batch in dropped) / max(would_raise, 1)
            if share > DROPPED_SHARE and falls(values, steepness):
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


def falls(values: Sequence[float], steepness: float = STEEPNESS) -> bool:
    """Whether the least-squares trend of `values` is more than `steepness` standard errors below 0."""
    from scipy.stats import linregress

    if len(values) < 3 or any(math.isnan(value) for value in values):
        return False
    trend = linregress(range(len(values)), values)
    # The last term is rounding: a constant reward does not fall.
    return -trend.slope > steepness * trend.stderr + 1e-9 * max(map(abs, values))
