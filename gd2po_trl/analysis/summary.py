"""The evidence in a handful of sentences."""

import math
from collections.abc import Callable

import numpy as np

from ..reporting import join, percent
from .results import Analysis
from .wording import interval


# Fewer groups than this, and the figures are called rough.
FEW_GROUPS = 100


def summarize(analysis: Analysis) -> list[str]:
    """What the rollouts are, how far the rewards conflict in them, and what the filters would make of it."""
    parts: list[Callable[[Analysis], str]] = [_data, _conflict, _chance, _course, _filters, _signal]
    return [sentence for part in parts if (sentence := part(analysis))]


def _data(analysis: Analysis) -> str:
    size = (
        f"{analysis.rollouts:,} rollouts in {analysis.groups:,} groups of {analysis.group_size}, "
        f"{analysis.steps:,} logged step{'s' if analysis.steps != 1 else ''}."
    )
    if analysis.groups < FEW_GROUPS:
        size += " So few groups make every figure a rough one."
    return size


def _conflict(analysis: Analysis) -> str:
    if len(analysis.rewards) == 1 or math.isnan(analysis.conflict_ratio):
        return ""
    if analysis.conflict_ratio == 0:
        return "The rewards disagree on none of the rollouts."
    low, high = interval(analysis.conflict_ratio, analysis.conflict_ratio_error)
    ratio = percent(analysis.conflict_ratio)
    if high > low:
        ratio += f" (95 % interval {percent(low)} to {percent(high)})"
    if len(analysis.rewards) == 2:
        return f"{join([one.name for one in analysis.rewards])} disagree on {ratio} of the rollouts."
    pair = max(analysis.pairs, key=lambda pair: pair.conflict_ratio)
    return (
        f"The rewards disagree on {ratio} of the rollouts; most often {pair.first} and {pair.second} "
        f"({percent(pair.conflict_ratio)})."
    )


def _chance(analysis: Analysis) -> str:
    expected, observed = analysis.unrelated_ratio, analysis.conflict_ratio
    if len(analysis.rewards) == 1 or not expected > 0:
        return ""
    relation = observed / expected
    meaning = (
        "these work against each other more than chance would have it"
        if relation > 1.1
        else "these mostly pull the same way"
        if relation < 0.6
        else "these pull the same way more often than chance would have it"
        if relation < 0.9
        else "these are about unrelated, which is not the same as opposed"
    )
    return f"Rewards that had nothing to do with each other would disagree on {percent(expected)} of them: {meaning}."


def _course(analysis: Analysis) -> str:
    over = analysis.over_steps
    ratios, rollouts = np.array(over.conflict_ratio), np.array(over.rollouts, dtype=np.float64)
    if len(ratios) < 5 or not analysis.conflict_ratio > 0:
        return ""
    part = max(len(ratios) // 5, 1)
    early, late = (
        float(np.nansum(ratios[cut] * rollouts[cut]) / max(rollouts[cut].sum(), 1))
        for cut in (slice(None, part), slice(-part, None))
    )
    # Roughly: the two parts hold a fifth of the groups each.
    noise = 2 * analysis.conflict_ratio_error * math.sqrt(2 * len(ratios) / part)
    change = "stays about the same" if abs(late - early) <= noise else "rises" if late > early else "falls"
    span = f"({percent(early)} in the first fifth of the steps, {percent(late)} in the last)"
    return f"Over the run the conflict {change} {span}."


def _filters(analysis: Analysis) -> str:
    if len(analysis.rewards) == 1 or not analysis.conflict_ratio > 0:
        return ""
    hard, *snr = analysis.filters
    sentence = (
        f"GD²PO-Hard would drop {percent(1 - hard.kept_ratio)} of the rollouts, which hold "
        f"{percent(1 - hard.kept_push)} of the summed advantages; {percent(hard.emptied_groups)} of the groups with "
        "an advantage would keep no rollout."
    )
    if snr:
        shares = [f"{percent(1 - one.kept_ratio)} at {one.threshold:g}" for one in snr]
        sentence += f" GD²PO-SNR would drop {', '.join(shares)}."
    return f"{sentence} {percent(analysis.cancellation)} of the rewards' advantages cancel out in the sum."


def _signal(analysis: Analysis) -> str:
    if not analysis.groups_without_signal >= 0.2:
        return ""
    return (
        f"In {percent(analysis.groups_without_signal)} of the groups no reward varies: nothing can be learned from "
        "them, and whitening with a mean shift still gives their rollouts a small advantage."
    )
