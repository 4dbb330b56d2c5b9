"""The figures of the report: what the rewards do to each other, and what each method would make of it.

Normalized rewards, conflict and agreement come from [`compute_advantages`], exactly as in training; here they are only
counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from ..advantages import RESIDUE, SIGN_EPS, compute_advantages, survives_filter
from ..diagnostics import pair_conflicts, pair_name
from .groups import Groups
from .noise import look_like_noise
from .reading import Rollouts
from .records import CONSENSUS_BINS, Analysis, FilterFigures, PairFigures, RewardFigures, StepFigures


AGREEMENT_BINS = 20
# The share of the steps that counts as recent.
RECENT = 1 / 3


@dataclass(frozen=True)
class Normalized:
    """
    The normalized rewards of R grouped rollouts, in the order of `Groups.order`.

    Args:
        unweighted, weighted (`np.ndarray` of shape `(R, K)`): Before and after the weight.
        scored_by (`np.ndarray` of shape `(R, K)`, bool): Which rewards scored the rollout.
        conflict (`np.ndarray` of shape `(R,)`, bool): Whether the rewards disagree.
        agreement (`np.ndarray` of shape `(R,)`): `sum_k A_k / sum_k |A_k|`.
    """

    unweighted: np.ndarray
    weighted: np.ndarray
    scored_by: np.ndarray
    conflict: np.ndarray
    agreement: np.ndarray


def normalize(rollouts: Rollouts, groups: Groups, weights: np.ndarray, scale_rewards: str = "group") -> Normalized:
    """Normalize the rewards of every group as training does, all groups of one size (and batch) at once."""
    rewards = rollouts.rewards[groups.order]
    unweighted, weighted = np.zeros_like(rewards), np.zeros_like(rewards)
    conflict: np.ndarray = np.zeros(len(rewards), dtype=bool)
    agreement = np.zeros(len(rewards))
    batch = groups.steps if scale_rewards == "batch" else np.zeros_like(groups.steps)
    for size, step in np.unique(np.stack([groups.sizes, batch], axis=1), axis=0).tolist():
        members = (groups.starts[(groups.sizes == size) & (batch == step)][:, None] + np.arange(size)).reshape(-1)
        values = torch.from_numpy(rewards[members])
        options: dict[str, Any] = {"conflict_filter": None, "consensus_weighting": None, "whitening": None}
        unweighted[members] = compute_advantages(values, size, **options).per_reward.numpy()
        breakdown = compute_advantages(
            values, size, reward_weights=torch.from_numpy(weights), scale_rewards=scale_rewards, **options
        )
        weighted[members] = breakdown.per_reward.numpy()
        conflict[members] = breakdown.conflict.numpy()
        agreement[members] = breakdown.agreement.numpy()
    return Normalized(unweighted, weighted, ~np.isnan(rewards), conflict, agreement)


def measure(
    rollouts: Rollouts, groups: Groups, normalized: Normalized, weights: np.ndarray, thresholds: Sequence[float]
) -> Analysis:
    """Count what the report shows, with the SNR filter judged at the `thresholds`."""
    counts = _Counts(rollouts, groups, normalized, weights)
    conflict, scored = normalized.conflict, counts.scored.sum()
    agreement, _ = np.histogram(np.abs(normalized.agreement[conflict]), AGREEMENT_BINS, range=(0, 1))
    return Analysis(
        rollouts=int(scored),
        groups=len(groups.sizes),
        group_size=groups.typical_size,
        steps=len(np.unique(groups.steps)),
        conflict_ratio=_ratio(conflict.sum(), scored),
        conflict_ratio_error=_standard_error(groups.sum(conflict), counts.scored_per_group),
        conflict_ratio_with_signal=_ratio(conflict.sum(), counts.with_signal.sum()),
        unrelated_ratio=_ratio(counts.expected.sum(), scored),
        cancellation=float(_cancellation(counts.net.sum(), counts.push.sum())),
        groups_without_signal=float(1 - counts.signal_per_group.mean()),
        agreement_distribution=(agreement / max(agreement.sum(), 1)).tolist(),
        rewards=counts.rewards(),
        pairs=counts.pairs(),
        filters=[counts.filter(threshold) for threshold in (None, *sorted(set(thresholds), reverse=True))],
        over_steps=counts.over_steps(),
        warnings=[*rollouts.warnings, *groups.warnings],
        notes=[*rollouts.notes, *groups.notes],
    )


class _Counts:
    """The data in the order of its groups, and what several figures are made of."""

    def __init__(self, rollouts: Rollouts, groups: Groups, normalized: Normalized, weights: np.ndarray):
        self.data, self.groups, self.normalized, self.weights = rollouts, groups, normalized, weights
        self.names = rollouts.reward_names
        self.values = rollouts.rewards[groups.order]
        weighted = normalized.weighted
        self.scored = np.any(normalized.scored_by, axis=1)
        self.with_signal = (np.abs(weighted) > SIGN_EPS).any(1)
        self.push, self.net = np.abs(weighted).sum(1), np.abs(weighted.sum(1))
        self.opposed = pair_conflicts(torch.from_numpy(weighted)).numpy()
        self.signal = groups.any(np.abs(normalized.unweighted) > SIGN_EPS)
        self.scored_per_group = groups.sum(self.scored)
        self.signal_per_group = groups.any(self.with_signal)
        self.expected, self.expected_of_pairs = self._expected_if_unrelated()

    def _expected_if_unrelated(self) -> tuple[np.ndarray, np.ndarray]:
        """
        How many rollouts of each group would conflict, overall `(M,)` and per pair `(M, P)`, on average over shuffling
        each reward's values within the group.

        A rollout then has a positive advantage under reward k with probability p_k (the share of the group that has
        one), and a negative one with n_k, independently of the other rewards. It is free of conflict if no reward
        gives a negative one or none gives a positive one, which both hold if none gives any:
        `1 - prod(1 - n_k) - prod(1 - p_k) + prod(1 - n_k - p_k)`.
        """
        weighted, scored = self.normalized.weighted, self.scored_per_group
        count = np.maximum(scored, 1)[:, None]
        up, down = self.groups.sum(weighted > SIGN_EPS) / count, self.groups.sum(weighted < -SIGN_EPS) / count
        overall = 1 - (1 - down).prod(1) - (1 - up).prod(1) + (1 - down - up).prod(1)
        pairs = [up[:, a] * down[:, b] + down[:, a] * up[:, b] for a, b in combinations(range(up.shape[1]), 2)]
        by_pair = np.stack(pairs, axis=1) if pairs else np.zeros((len(overall), 0))
        return scored * overall, scored[:, None] * by_pair

    def rewards(self) -> list[RewardFigures]:
        groups, values, scored_by = self.groups, self.values, self.normalized.scored_by
        deviation, count = groups.centered(values, scored_by), groups.sum(scored_by)
        signal = self.signal
        # Over the groups in which a reward varies, each counted once.
        variance = groups.sum(deviation**2) / np.maximum(count - 1, 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.where(signal, variance, 0.0).sum(0) / signal.sum(0))
            outlier = np.abs(deviation).max(0) / spread
        grpo = self._shares_of_the_sum()
        gdpo = self.normalized.unweighted * self.weights
        total = gdpo.sum(1)
        recent = groups.steps >= np.quantile(np.unique(groups.steps), 1 - RECENT)
        noise = look_like_noise(self.data, groups, self.normalized)
        figures = []
        for k, name in enumerate(self.names):
            known = values[scored_by[:, k], k]
            latest = values[scored_by[:, k] & recent[groups.index], k]
            figures.append(
                RewardFigures(
                    name=name,
                    weight=float(self.weights[k]),
                    scored=_ratio(len(known), self.scored.sum()),
                    mean=_ratio(known.sum(), len(known)),
                    std=float(known.std(ddof=1)) if len(known) > 1 else np.nan,
                    minimum=float(known.min()) if len(known) else np.nan,
                    maximum=float(known.max()) if len(known) else np.nan,
                    std_within_groups=math.sqrt(
                        _ratio((deviation[:, k] ** 2).sum(), np.maximum(count[:, k] - 1, 0).sum())
                    ),
                    spread=float(spread[k]),
                    groups_without_signal=float(1 - signal[:, k].mean()),
                    recent_groups_without_signal=float(1 - signal[recent, k].mean()),
                    recent_mean=_ratio(latest.sum(), len(latest)),
                    distinct_values=len(np.unique(known)),
                    outlier=float(outlier[k]),
                    looks_like_noise=bool(noise[k]),
                    share_sum_then_normalise=float(grpo[k]),
                    share_normalise_then_sum=_ratio((gdpo[:, k] * total).sum(), (total * total).sum()),
                )
            )
        return figures

    def _shares_of_the_sum(self) -> np.ndarray:
        """How the variance of the weighted sum of rewards within a group divides among them, averaged over groups."""
        groups = self.groups
        # As GRPO sums them: an unscored reward adds nothing.
        terms = np.nan_to_num(self.values) * self.weights
        deviation = groups.centered(terms, self.scored[:, None])
        total = deviation.sum(1)
        products, squares = groups.sum(deviation * total[:, None]), groups.sum(total * total)
        # The sum of a constant column varies by rounding alone; that does not count as variance.
        alive = squares > (RESIDUE * np.maximum.reduceat(np.abs(terms).max(1), groups.starts)) ** 2
        if not alive.any():
            return np.full(terms.shape[1], np.nan)
        # A group's GRPO advantages have variance 1 whatever the spread of the sum, so that it counts by n - 1.
        degrees = self.scored_per_group[alive] - 1
        return (products[alive] / squares[alive, None] * degrees[:, None]).sum(0) / degrees.sum()

    def pairs(self) -> list[PairFigures]:
        weighted, scored_by = self.normalized.weighted, self.normalized.scored_by
        scored = self.scored.sum()
        figures = []
        for index, (a, b) in enumerate(combinations(range(len(self.names)), 2)):
            opposed = self.opposed[:, index]
            alive = (self.signal[:, a] & self.signal[:, b])[self.groups.index]
            both = scored_by[:, a] & scored_by[:, b] & alive
            first, second = self.normalized.unweighted[both][:, [a, b]].T
            figures.append(
                PairFigures(
                    first=self.names[a],
                    second=self.names[b],
                    conflict_ratio=_ratio(opposed.sum(), scored),
                    first_up=_ratio((opposed & (weighted[:, a] > 0)).sum(), scored),
                    second_up=_ratio((opposed & (weighted[:, b] > 0)).sum(), scored),
                    unrelated_ratio=_ratio(self.expected_of_pairs[:, index].sum(), scored),
                    correlation=_ratio((first * second).sum(), np.sqrt((first**2).sum() * (second**2).sum())),
                )
            )
        return figures

    def filter(self, threshold: float | None) -> FilterFigures:
        survives = survives_filter(
            torch.from_numpy(self.normalized.conflict),
            torch.from_numpy(self.normalized.agreement),
            "hard" if threshold is None else "snr",
            threshold or 0.0,
        )
        kept = self.scored & survives.numpy()
        kept_per_group, present = self.groups.sum(kept), self.scored_per_group > 0
        consensus = kept_per_group[present] / self.scored_per_group[present]
        # Bin 0 is exactly none, the last exactly all; the quarters between are open below and closed above.
        bins = np.where(consensus == 0, 0, np.where(consensus == 1, 5, np.ceil(consensus * 4).clip(1, 4))).astype(int)
        return FilterFigures(
            name="hard" if threshold is None else "snr",
            threshold=threshold,
            kept_ratio=_ratio(kept.sum(), self.scored.sum()),
            kept_ratio_with_signal=_ratio((kept & self.with_signal).sum(), self.with_signal.sum()),
            kept_push=_ratio(self.net[kept].sum(), self.net.sum()),
            emptied_groups=_ratio((self.signal_per_group & (kept_per_group == 0)).sum(), self.signal_per_group.sum()),
            consensus_mean=_ratio(consensus.sum(), len(consensus)),
            consensus_distribution=(np.bincount(bins, minlength=len(CONSENSUS_BINS)) / max(len(bins), 1)).tolist(),
        )

    def over_steps(self) -> StepFigures:
        steps, group_step = np.unique(self.groups.steps, return_inverse=True)

        def total(values: np.ndarray) -> np.ndarray:
            of_groups = values if len(values) == len(group_step) else self.groups.sum(values)
            return np.bincount(group_step, weights=of_groups, minlength=len(steps))

        scored, conflict = total(self.scored), total(self.normalized.conflict)
        names, scored_by = self.names, self.normalized.scored_by
        with np.errstate(invalid="ignore", divide="ignore"):
            return StepFigures(
                step=steps.tolist(),
                rollouts=scored.astype(int).tolist(),
                conflict_ratio=(conflict / scored).tolist(),
                unrelated_ratio=(total(self.expected) / scored).tolist(),
                cancellation=_cancellation(total(self.net), total(self.push)).tolist(),
                groups_without_signal=(1 - total(self.signal_per_group) / np.bincount(group_step)).tolist(),
                pair_conflict_ratio={
                    pair_name(first, second): (total(self.opposed[:, index]) / scored).tolist()
                    for index, (first, second) in enumerate(combinations(names, 2))
                },
                reward_mean={
                    name: (total(np.nan_to_num(self.values[:, k])) / total(scored_by[:, k])).tolist()
                    for k, name in enumerate(names)
                },
            )


def _standard_error(hits: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of the ratio `sum hits / sum counts` over independent groups (linearized)."""
    if len(hits) < 2 or counts.sum() == 0:
        return np.nan
    residual = hits - hits.sum() / counts.sum() * counts
    return float(np.sqrt((residual**2).sum() * len(hits) / (len(hits) - 1)) / counts.sum())


def _cancellation(net: np.ndarray, push: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        # Clamped, since rounding can leave it just below zero.
        return np.maximum(1 - net / push, 0.0)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan
