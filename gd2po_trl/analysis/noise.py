"""Which rewards look like noise: nothing that is known of the rollouts has to do with them."""

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from ..advantages import SIGN_EPS
from .groups import Groups
from .reading import Rollouts


if TYPE_CHECKING:
    from .statistics import Normalized

# A relation is seen where chance alone would show as strong a one less often than this.
SIGNIFICANT = 0.003
# Fewer groups in which the reward varies, or fewer rollouts in them, and nothing is said.
FEW_GROUPS = 20
FEW_ROLLOUTS = 100
# Of pairs of rollouts in one group, at most this share may have the same completion for those pairs to say something:
# files without the real texts repeat one.
MOSTLY_REPEATED = 0.5
FEW_PAIRS = 10


def look_like_noise(rollouts: Rollouts, groups: Groups, normalized: "Normalized") -> np.ndarray:
    """
    Which rewards look like noise, shape `(K,)`, bool.

    Either a reward gave the same completion of the same prompt values that differ about as often as those of different
    completions do. Or it shows no relation to anything: its group means differ no more than its values within groups
    let expect (one-way analysis of variance), and do not change with the step; within groups it correlates neither
    with the length of the completion nor with another reward. It may still be a reward: those that the policy hits by
    chance look like this at first.
    """
    starts, group = groups.starts, normalized.group
    rewards = rollouts.rewards[groups.order]
    length = _standardized(np.log1p(rollouts.length[groups.order])[:, None], groups)[:, 0]
    repeats = _repeated_pairs(rollouts, groups)
    advantages = normalized.unweighted
    varies = np.logical_or.reduceat(np.abs(advantages) > SIGN_EPS, starts)  # (M, K)
    verdicts = np.zeros(rewards.shape[1], dtype=bool)
    for k in range(rewards.shape[1]):
        in_use = varies[group, k] & normalized.scored_by[:, k]
        if varies[:, k].sum() < FEW_GROUPS or in_use.sum() < FEW_ROLLOUTS:
            continue
        same, different = _changed(repeats, rewards[:, k], in_use)
        if same is not None and same > 0.5 * different:
            verdicts[k] = True
            continue
        if same == 0.0:
            continue  # equal texts have equal values, where others differ
        others = [length, *(advantages[:, j] for j in range(rewards.shape[1]) if j != k)]
        related = [_correlates(advantages[:, k], other, group, len(starts)) for other in others]
        verdicts[k] = not any(
            chance < SIGNIFICANT
            for chance in [*related, *_between_groups(rewards[:, k], normalized.scored_by[:, k], groups)]
        )
    return verdicts


def _standardized(values: np.ndarray, groups: Groups) -> np.ndarray:
    """`values` `(R, C)` with mean 0 and standard deviation 1 within each group; 0 where a group is constant."""
    sizes: np.ndarray = np.repeat(groups.sizes, groups.sizes)[:, None]
    deviation = values - np.repeat(np.add.reduceat(values, groups.starts), groups.sizes, axis=0) / sizes
    squares = np.repeat(np.add.reduceat(deviation**2, groups.starts), groups.sizes, axis=0)
    scale = np.sqrt(squares / np.maximum(sizes - 1, 1))
    return np.where(scale > 1e-9, deviation / np.maximum(scale, 1e-9), 0.0)


def _correlates(first: np.ndarray, second: np.ndarray, group: np.ndarray, count: int) -> float:
    """How often shuffling within groups would give as strong a correlation."""
    product = np.bincount(group, weights=first * second, minlength=count)
    squares = [np.bincount(group, weights=values**2, minlength=count) for values in (first, second)]
    sizes = np.bincount(group, minlength=count)
    variance = (squares[0] * squares[1] / np.maximum(sizes - 1, 1)).sum()
    return float(2 * stats.norm.sf(abs(product.sum()) / np.sqrt(variance))) if variance > 0 else 1.0


def _between_groups(values: np.ndarray, scored: np.ndarray, groups: Groups) -> list[float]:
    """How often chance alone would spread the group means as far, and tie them to the step as closely."""
    group = np.repeat(np.arange(len(groups.sizes)), groups.sizes)[scored]
    values = values[scored]
    counts = np.bincount(group, minlength=len(groups.sizes))
    present = counts > 0
    means = np.bincount(group, weights=values, minlength=len(counts)) / np.maximum(counts, 1)
    within = ((values - means[group]) ** 2).sum()
    between = (counts * (means - values.mean()) ** 2).sum()
    freedom = present.sum() - 1, len(values) - present.sum()
    if freedom[0] < 1 or freedom[1] < 1 or within <= 0:
        return [0.0]
    chances = [float(stats.f.sf(between / freedom[0] / (within / freedom[1]), *freedom))]
    steps = groups.steps[present]
    if len(np.unique(steps)) >= 5:
        chances.append(float(stats.spearmanr(steps, means[present]).pvalue))
    return [chance for chance in chances if not np.isnan(chance)]


def _repeated_pairs(rollouts: Rollouts, groups: Groups) -> np.ndarray | None:
    """Pairs, `(P, 2)`, of rollouts of a group with equal completions; `None` if most are in such a pair."""
    group: np.ndarray = np.repeat(np.arange(len(groups.sizes)), groups.sizes)
    completion = rollouts.completion[groups.order]
    order = np.lexsort((completion, group))
    same = (group[order][1:] == group[order][:-1]) & (completion[order][1:] == completion[order][:-1])
    if same.mean() > MOSTLY_REPEATED:
        return None
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def _changed(repeats: np.ndarray | None, values: np.ndarray, in_use: np.ndarray) -> tuple[float | None, float]:
    """The share of the repeated pairs, and of neighbors in general, whose values differ; `None` if too few repeat."""
    if repeats is None:
        return None, 0.0
    pairs = repeats[in_use[repeats].all(1)] if len(repeats) else repeats
    if len(pairs) < FEW_PAIRS:
        return None, 0.0
    neighbors = in_use[1:] & in_use[:-1]
    different = float((values[1:] != values[:-1])[neighbors].mean())
    return float((values[pairs[:, 0]] != values[pairs[:, 1]]).mean()), different
