"""The figures of the report: what the rewards do to each other, and what each method would make of it.

Normalized rewards, conflict and agreement come from [`compute_advantages`], exactly as in training; here they are only
counted.
"""

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
from .results import CONSENSUS_BINS, Analysis, FilterFigures, PairFigures, RewardFigures, StepFigures


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
        group (`np.ndarray` of shape `(R,)`, int64): Index of the group.
    """

    unweighted: np.ndarray
    weighted: np.ndarray
    scored_by: np.ndarray
    conflict: np.ndarray
    agreement: np.ndarray
    group: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """Which rollouts some reward scored, `(R,)` bool."""
        return np.any(self.scored_by, axis=1)


def normalize(rollouts: Rollouts, groups: Groups, weights: np.ndarray, scale_rewards: str = "group") -> Normalized:
    """Normalize the rewards of every group as training does, all groups of one size (and batch) at once."""
    rewards = rollouts.rewards[groups.order]
    unweighted = np.zeros_like(rewards)
    weighted = np.zeros_like(rewards)
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
    return Normalized(
        unweighted=unweighted,
        weighted=weighted,
        scored_by=~np.isnan(rewards),
        conflict=conflict,
        agreement=agreement,
        group=np.repeat(np.arange(len(groups.sizes)), groups.sizes),
    )


def measure(
    rollouts: Rollouts,
    groups: Groups,
    normalized: Normalized,
    weights: np.ndarray,
    thresholds: Sequence[float],
) -> Analysis:
    """
    Count what the report shows.

    Args:
        rollouts ([`Rollouts`]), groups ([`Groups`]), normalized ([`Normalized`]):
            The data, its groups and their normalized rewards.
        weights (`np.ndarray` of shape `(K,)`):
            Weight of each reward.
        thresholds (sequence of `float`):
            Thresholds at which to judge the SNR filter.
    """
    names = rollouts.reward_names
    rewards = rollouts.rewards[groups.order]
    scored = int(normalized.scored.sum())
    push = np.abs(normalized.weighted).sum(1)
    net = np.abs(normalized.weighted.sum(1))
    with_signal = (np.abs(normalized.weighted) > SIGN_EPS).any(1)
    pairs = pair_conflicts(torch.from_numpy(normalized.weighted)).numpy()
    starts = groups.starts
    conflicts_per_group = np.add.reduceat(normalized.conflict.astype(np.float64), starts)
    scored_per_group = np.add.reduceat(normalized.scored.astype(np.float64), starts)
    signal_per_group = np.logical_or.reduceat(with_signal, starts)
    conflict_ratio = _ratio(conflicts_per_group.sum(), scored)
    expected, expected_pairs = _expected_if_unrelated(normalized, scored_per_group, starts)
    agreement_counts, _ = np.histogram(np.abs(normalized.agreement[normalized.conflict]), AGREEMENT_BINS, range=(0, 1))
    filters = [None, *sorted(set(thresholds), reverse=True)]

    return Analysis(
        rollouts=scored,
        groups=len(groups.sizes),
        group_size=groups.typical_size,
        steps=len(np.unique(groups.steps)),
        conflict_ratio=conflict_ratio,
        conflict_ratio_error=_standard_error(conflicts_per_group, scored_per_group),
        conflict_ratio_with_signal=_ratio(normalized.conflict.sum(), with_signal.sum()),
        unrelated_ratio=_ratio(expected.sum(), scored),
        cancellation=_cancellation(net.sum(), push.sum()),
        groups_without_signal=float(1 - signal_per_group.mean()),
        agreement_distribution=(agreement_counts / max(agreement_counts.sum(), 1)).tolist(),
        rewards=_reward_figures(rollouts, weights, rewards, normalized, groups),
        pairs=[
            _pair_figures(names, (a, b), normalized, starts, pairs[:, index], expected_pairs[:, index], scored)
            for index, (a, b) in enumerate(combinations(range(len(names)), 2))
        ],
        filters=[
            _filter_figures(threshold, normalized, with_signal, net, signal_per_group, scored_per_group, starts)
            for threshold in filters
        ],
        over_steps=_over_steps(names, groups, rewards, normalized, pairs, push, net, signal_per_group, expected),
        warnings=[*rollouts.warnings, *groups.warnings],
        notes=[*rollouts.notes, *groups.notes],
    )


def _reward_figures(
    rollouts: Rollouts, weights: np.ndarray, rewards: np.ndarray, normalized: Normalized, groups: Groups
) -> list[RewardFigures]:
    names = rollouts.reward_names
    deviation = _centred(rewards, normalized.scored_by, groups)
    count = np.add.reduceat(normalized.scored_by.astype(np.float64), groups.starts)
    # What GRPO normalizes: the weighted sum, an unscored reward adding nothing to it.
    terms = np.nan_to_num(rewards) * weights
    grpo_shares = _shares_of_groups(terms, normalized.scored, groups)
    gdpo_terms = normalized.unweighted * weights
    total = gdpo_terms.sum(1)
    gdpo_shares = [_ratio((gdpo_terms[:, k] * total).sum(), (total * total).sum()) for k in range(len(names))]
    degrees = np.maximum(count - 1, 0).sum(0)
    signal = np.logical_or.reduceat(np.abs(normalized.unweighted) > SIGN_EPS, groups.starts)
    spread = _spread(deviation, count, signal, groups)
    recent = groups.steps >= np.quantile(np.unique(groups.steps), 1 - RECENT)
    recent_rewards = rewards[recent[normalized.group]]
    with np.errstate(invalid="ignore", divide="ignore"):
        outlier = np.abs(deviation).max(0) / spread
    noise = look_like_noise(rollouts, groups, normalized)
    return [
        RewardFigures(
            name=name,
            weight=float(weights[k]),
            scored=_ratio(count[:, k].sum(), normalized.scored.sum()),
            mean=float(np.nanmean(rewards[:, k])) if count[:, k].any() else np.nan,
            std=float(np.nanstd(rewards[:, k], ddof=1)) if count[:, k].sum() > 1 else np.nan,
            minimum=float(np.nanmin(rewards[:, k])) if count[:, k].any() else np.nan,
            maximum=float(np.nanmax(rewards[:, k])) if count[:, k].any() else np.nan,
            std_within_groups=float(np.sqrt(_ratio((deviation[:, k] ** 2).sum(), degrees[k]))),
            spread=float(spread[k]),
            groups_without_signal=float(1 - signal[:, k].mean()),
            recent_groups_without_signal=float(1 - signal[recent, k].mean()),
            recent_mean=_ratio(np.nansum(recent_rewards[:, k]), (~np.isnan(recent_rewards[:, k])).sum()),
            distinct_values=len(np.unique(rewards[normalized.scored_by[:, k], k])),
            outlier=float(outlier[k]),
            looks_like_noise=bool(noise[k]),
            share_sum_then_normalise=float(grpo_shares[k]),
            share_normalise_then_sum=float(gdpo_shares[k]),
        )
        for k, name in enumerate(names)
    ]


def _spread(deviation: np.ndarray, count: np.ndarray, signal: np.ndarray, groups: Groups) -> np.ndarray:
    """The root of the mean sample variance over the groups in which a reward varies, `(K,)`; NaN if it never does."""
    variance = np.add.reduceat(deviation**2, groups.starts) / np.maximum(count - 1, 1)
    with np.errstate(invalid="ignore"):
        return np.sqrt(np.where(signal, variance, 0.0).sum(0) / signal.sum(0))


def _centred(values: np.ndarray, counts: np.ndarray, groups: Groups) -> np.ndarray:
    """Deviation of `values` `(R, K)` from the mean over those of their group that count; 0 for the others."""
    present = np.where(counts, values, 0.0)
    means = np.add.reduceat(present, groups.starts) / np.maximum(np.add.reduceat(counts * 1.0, groups.starts), 1)
    return np.where(counts, present - np.repeat(means, groups.sizes, axis=0), 0.0)


def _shares_of_groups(terms: np.ndarray, scored: np.ndarray, groups: Groups) -> np.ndarray:
    """How the variance of the summed `terms` `(R, K)` within a group divides among them, averaged over groups."""
    deviation = _centred(terms, np.broadcast_to(scored[:, None], terms.shape), groups)
    total = deviation.sum(1)
    products = np.add.reduceat(deviation * total[:, None], groups.starts)
    squares = np.add.reduceat(total * total, groups.starts)
    # What rounding leaves of a constant sum is no variance.
    residue = RESIDUE * np.maximum.reduceat(np.abs(terms).max(1), groups.starts)
    alive = squares > residue**2
    if not alive.any():
        return np.full(terms.shape[1], np.nan)
    # A group's GRPO advantages have variance 1 whatever the spread of the sum, so that it counts by n - 1.
    degrees = np.add.reduceat(scored * 1.0, groups.starts)[alive] - 1
    return (products[alive] / squares[alive, None] * degrees[:, None]).sum(0) / degrees.sum()


def _pair_figures(
    names: list[str],
    pair: tuple[int, int],
    normalized: Normalized,
    starts: np.ndarray,
    opposed: np.ndarray,
    expected: np.ndarray,
    scored: int,
) -> PairFigures:
    a, b = pair
    first, second = normalized.unweighted[:, a], normalized.unweighted[:, b]
    alive = np.logical_or.reduceat(np.abs(first) > SIGN_EPS, starts)
    alive &= np.logical_or.reduceat(np.abs(second) > SIGN_EPS, starts)
    both = normalized.scored_by[:, a] & normalized.scored_by[:, b] & alive[normalized.group]
    norm = np.sqrt((first[both] ** 2).sum() * (second[both] ** 2).sum())
    return PairFigures(
        first=names[a],
        second=names[b],
        conflict_ratio=_ratio(opposed.sum(), scored),
        first_up=_ratio((opposed & (normalized.weighted[:, a] > 0)).sum(), scored),
        second_up=_ratio((opposed & (normalized.weighted[:, b] > 0)).sum(), scored),
        unrelated_ratio=_ratio(expected.sum(), scored),
        correlation=_ratio((first[both] * second[both]).sum(), norm),
    )


def _filter_figures(
    threshold: float | None,
    normalized: Normalized,
    with_signal: np.ndarray,
    net: np.ndarray,
    signal_per_group: np.ndarray,
    scored_per_group: np.ndarray,
    starts: np.ndarray,
) -> FilterFigures:
    survives = survives_filter(
        torch.from_numpy(normalized.conflict),
        torch.from_numpy(normalized.agreement),
        "hard" if threshold is None else "snr",
        0.0 if threshold is None else threshold,
    )
    kept = normalized.scored & survives.numpy()
    kept_per_group = np.add.reduceat(kept.astype(np.float64), starts)
    present = scored_per_group > 0
    consensus = kept_per_group[present] / scored_per_group[present]
    # Bin 0 is exactly none, the last exactly all; the quarters between are open below and closed above.
    bins = np.where(consensus == 0, 0, np.where(consensus == 1, 5, np.ceil(consensus * 4).clip(1, 4))).astype(int)
    return FilterFigures(
        name="hard" if threshold is None else "snr",
        threshold=threshold,
        kept_ratio=_ratio(kept.sum(), normalized.scored.sum()),
        kept_ratio_with_signal=_ratio((kept & with_signal).sum(), with_signal.sum()),
        kept_push=_ratio(net[kept].sum(), net.sum()),
        emptied_groups=_ratio((signal_per_group & (kept_per_group == 0)).sum(), signal_per_group.sum()),
        consensus_mean=_ratio(consensus.sum(), len(consensus)),
        consensus_distribution=(np.bincount(bins, minlength=len(CONSENSUS_BINS)) / max(len(bins), 1)).tolist(),
    )


def _over_steps(
    names: list[str],
    groups: Groups,
    rewards: np.ndarray,
    normalized: Normalized,
    pairs: np.ndarray,
    push: np.ndarray,
    net: np.ndarray,
    signal_per_group: np.ndarray,
    expected: np.ndarray,
) -> StepFigures:
    steps, group_step = np.unique(groups.steps, return_inverse=True)
    row_step = group_step[normalized.group]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(row_step, weights=values, minlength=len(steps))

    scored = total(normalized.scored)
    groups_per_step = np.bincount(group_step, minlength=len(steps))
    with np.errstate(invalid="ignore", divide="ignore"):
        pair_ratios = {
            pair_name(first, second): (total(pairs[:, index]) / scored).tolist()
            for index, (first, second) in enumerate(combinations(names, 2))
        }
        means = {
            name: (total(np.nan_to_num(rewards[:, k])) / total(normalized.scored_by[:, k])).tolist()
            for k, name in enumerate(names)
        }
        return StepFigures(
            step=steps.tolist(),
            rollouts=scored.astype(int).tolist(),
            conflict_ratio=(total(normalized.conflict) / scored).tolist(),
            unrelated_ratio=(np.bincount(group_step, weights=expected, minlength=len(steps)) / scored).tolist(),
            cancellation=np.maximum(1 - total(net) / total(push), 0.0).tolist(),
            groups_without_signal=(
                1 - np.bincount(group_step, weights=signal_per_group, minlength=len(steps)) / groups_per_step
            ).tolist(),
            pair_conflict_ratio=pair_ratios,
            reward_mean=means,
        )


def _expected_if_unrelated(
    normalized: Normalized, scored_per_group: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    How many rollouts of each group would conflict, overall `(M,)` and per pair `(M, P)`, on average over shuffling
    each reward's values within the group.

    A rollout then has a positive advantage under reward k with probability p_k (the share of the group that has one),
    and a negative one with n_k, independently of the other rewards. It is free of conflict if no reward gives a
    negative one or none gives a positive one, which both hold if none gives any:
    `1 - prod(1 - n_k) - prod(1 - p_k) + prod(1 - n_k - p_k)`.
    """
    count = np.maximum(scored_per_group, 1)[:, None]
    up = np.add.reduceat((normalized.weighted > SIGN_EPS) * 1.0, starts) / count
    down = np.add.reduceat((normalized.weighted < -SIGN_EPS) * 1.0, starts) / count
    overall = 1 - (1 - down).prod(1) - (1 - up).prod(1) + (1 - down - up).prod(1)
    pairs = [up[:, a] * down[:, b] + down[:, a] * up[:, b] for a, b in combinations(range(up.shape[1]), 2)]
    by_pair = np.stack(pairs, axis=1) if pairs else np.zeros((len(overall), 0))
    return scored_per_group * overall, scored_per_group[:, None] * by_pair


def _standard_error(hits: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of the ratio `sum hits / sum counts` over independent groups (linearised)."""
    if len(hits) < 2 or counts.sum() == 0:
        return np.nan
    residual = hits - hits.sum() / counts.sum() * counts
    return float(np.sqrt((residual**2).sum() * len(hits) / (len(hits) - 1)) / counts.sum())


def _cancellation(net: float, push: float) -> float:
    # Clamped, since rounding can leave it just below zero.
    return max(1 - net / push, 0.0) if push > 0 else np.nan


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan
