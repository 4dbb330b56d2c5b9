"""Which rewards look like noise: nothing that is known of the rollouts has to do with them."""

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from ..advantages import SIGN_EPS
from .groups import Groups
from .reading import Rollouts


if TYPE_CHECKING:
    from .measures import Normalized

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
    rewards, advantages, scored_by = rollouts.rewards[groups.order], normalized.unweighted, normalized.scored_by
    lengths = np.log1p(rollouts.length[groups.order])[:, None]
    others = np.hstack([advantages, groups.centered(lengths, np.ones_like(lengths, dtype=bool))])
    repeats = _repeated_pairs(rollouts, groups)
    varies = groups.any(np.abs(advantages) > SIGN_EPS)  # (M, K)
    verdicts = np.zeros(rewards.shape[1], dtype=bool)
    for k in range(rewards.shape[1]):
        in_use = varies[groups.index, k] & scored_by[:, k]
        if varies[:, k].sum() < FEW_GROUPS or in_use.sum() < FEW_ROLLOUTS:
            continue
        same, different = _changed(repeats, rewards[:, k], in_use)
        if same is not None and same > 0.5 * different:
            verdicts[k] = True
        elif same != 0.0:  # else equal texts have equal values, where others differ
            related = [_correlates(advantages[:, k], other, groups) for j, other in enumerate(others.T) if j != k]
            related += _between_groups(rewards[:, k], scored_by[:, k], groups)
            verdicts[k] = not any(chance < SIGNIFICANT for chance in related)
    return verdicts


def _correlates(first: np.ndarray, second: np.ndarray, groups: Groups) -> float:
    """How often shuffling within groups would give as strong a correlation."""
    variance = groups.sum(first**2) * groups.sum(second**2) / np.maximum(groups.sizes - 1, 1)
    if not variance.sum() > 0:
        return 1.0
    return float(2 * stats.norm.sf(abs((first * second).sum()) / np.sqrt(variance.sum())))


def _between_groups(values: np.ndarray, scored: np.ndarray, groups: Groups) -> list[float]:
    """How often chance alone would spread the group means as far, and tie them to the step as closely."""
    counts = groups.sum(scored)
    present = counts > 0
    means = groups.sum(np.where(scored, values, 0.0)) / np.maximum(counts, 1)
    within = (groups.centered(values[:, None], scored[:, None]) ** 2).sum()
    between = (counts * (means - values[scored].mean()) ** 2).sum()
    freedom = present.sum() - 1, scored.sum() - present.sum()
    if min(freedom) < 1 or within <= 0:
        return [0.0]
    chances = [float(stats.f.sf(between / freedom[0] / (within / freedom[1]), *freedom))]
    steps = groups.steps[present]
    if len(np.unique(steps)) >= 5:
        chances.append(float(stats.spearmanr(steps, means[present]).pvalue))
    return [chance for chance in chances if not np.isnan(chance)]


def _repeated_pairs(rollouts: Rollouts, groups: Groups) -> np.ndarray | None:
    """Pairs, `(P, 2)`, of rollouts of a group with equal completions; `None` if most are in such a pair."""
    group, completion = groups.index, rollouts.completion[groups.order]
    order = np.lexsort((completion, group))
    same = (group[order][1:] == group[order][:-1]) & (completion[order][1:] == completion[order][:-1])
    return None if same.mean() > MOSTLY_REPEATED else np.stack([order[:-1][same], order[1:][same]], axis=1)


def _changed(repeats: np.ndarray | None, values: np.ndarray, in_use: np.ndarray) -> tuple[float | None, float]:
    """The share of the repeated pairs, and of neighbors in general, whose values differ; `None` if too few repeat."""
    pairs = np.zeros((0, 2), dtype=int) if repeats is None else repeats[in_use[repeats].all(1)]
    if len(pairs) < FEW_PAIRS:
        return None, 0.0
    neighbors = in_use[1:] & in_use[:-1]
    different = float((values[1:] != values[:-1])[neighbors].mean())
    return float((values[pairs[:, 0]] != values[pairs[:, 1]]).mean()), different
