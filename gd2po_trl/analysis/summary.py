"""The figures in plain language, and an honest verdict."""

import math
from collections.abc import Callable

import numpy as np

from .statistics import Analysis, PairFigures


# Rules of thumb of this report: below the first share of conflicting rollouts, among those that some reward pushes at
# all, GD²PO all but equals GDPO, below the second a difference will drown in the noise between seeds.
LITTLE_CONFLICT = 0.05
SOME_CONFLICT = 0.15
# If Hard keeps less of the rollouts with signal than this, there is little left to learn from.
LITTLE_LEFT = 0.35
# From here on one direction of a conflict, or one reward of a sum, is said to prevail.
PREVAILING = 0.6
DOMINATING = 0.75
# Fewer groups than this, and the figures are called rough.
FEW_GROUPS = 100


def percent(share: float) -> str:
    """`share` as a percentage, with one decimal where the whole number would say too little."""
    if math.isnan(share):
        return "–"
    value = 100 * share
    return f"{value:.1f}%" if 0 < value < 1.95 or 98.05 < value < 100 else f"{value:.0f}%"


def summarise(analysis: Analysis) -> list[str]:
    """The report in a handful of sentences, the most important first and the verdict last."""
    parts: list[Callable[[Analysis], str]] = [_headline, _chance, _course, _filters, _signal, _balance, _verdict]
    return [sentence for part in parts if (sentence := part(analysis))]


def _headline(analysis: Analysis) -> str:
    size = (
        f"{analysis.rollouts:,} rollouts in {analysis.groups:,} groups of {analysis.group_size}, "
        f"{analysis.steps:,} logged step{'s' if analysis.steps != 1 else ''}."
    )
    if analysis.groups < FEW_GROUPS:
        size += " So few groups make every figure below a rough one."
    if len(analysis.rewards) == 1:
        return f"There is one reward, {analysis.rewards[0].name}, and so nothing to conflict with. {size}"
    error = f" (± {196 * analysis.conflict_ratio_error:.1f} points)" if analysis.conflict_ratio_error > 0 else ""
    ratio = percent(analysis.conflict_ratio) + error
    if analysis.conflict_ratio == 0 or math.isnan(analysis.conflict_ratio):
        return f"The rewards disagree on none of the rollouts. {size}"
    pair = max(analysis.pairs, key=lambda pair: pair.conflict_ratio)
    if len(analysis.rewards) == 2:
        return f"{pair.first} and {pair.second} disagree on {ratio} of the rollouts{_direction(pair)}. {size}"
    return (
        f"The rewards disagree on {ratio} of the rollouts; most often {pair.first} and {pair.second} "
        f"({percent(pair.conflict_ratio)}){_direction(pair)}. {size}"
    )


def _direction(pair: PairFigures) -> str:
    up, down, share = pair.first, pair.second, pair.first_up / pair.conflict_ratio
    if share < 0.5:
        up, down, share = down, up, 1 - share
    if share < PREVAILING:
        return ", in either direction about equally often"
    return f", mostly ({percent(share)} of these) rollouts that {up} favours and {down} penalises"


def _chance(analysis: Analysis) -> str:
    expected, observed = analysis.unrelated_ratio, analysis.conflict_ratio
    if len(analysis.rewards) == 1 or not expected > 0:
        return ""
    relation = observed / expected
    meaning = (
        "they work against each other more than chance would have it"
        if relation > 1.1
        else "they mostly pull the same way"
        if relation < 0.6
        else "they pull the same way more often than chance would have it"
        if relation < 0.9
        else "they are about unrelated, which is not the same as opposed"
    )
    return (
        f"Rewards that had nothing to do with each other would disagree on {percent(expected)} of these rollouts: "
        f"{meaning}."
    )


def _course(analysis: Analysis) -> str:
    over = analysis.over_steps
    ratios, rollouts = np.array(over.conflict_ratio), np.array(over.rollouts, dtype=np.float64)
    if len(ratios) < 5 or analysis.conflict_ratio == 0:
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
    if len(analysis.rewards) == 1 or analysis.conflict_ratio == 0:
        return ""
    hard, *snr = analysis.filters
    sentence = (
        f"Hard would drop {percent(1 - hard.kept_ratio)} of the rollouts ({percent(1 - hard.kept_ratio_with_signal)} "
        f"of those that carry any signal), which hold {percent(1 - hard.kept_push)} of the net push, and empty "
        f"{percent(hard.emptied_groups)} of the groups with signal."
    )
    if snr:
        shares = [f"{percent(1 - one.kept_ratio)} at {one.threshold:g}" for one in snr]
        sentence += f" SNR would drop {', '.join(shares)}."
    return f"{sentence} {percent(analysis.cancellation)} of the rewards' push cancels out in the sum."


def _signal(analysis: Analysis) -> str:
    silent = [reward for reward in analysis.rewards if reward.groups_without_signal >= 0.5]
    parts = [f"{reward.name} in {percent(reward.groups_without_signal)}" for reward in silent]
    sentence = f"Groups in which a reward tells no two rollouts apart: {', '.join(parts)}." if parts else ""
    if analysis.groups_without_signal >= 0.2:
        sentence += (
            f" In {percent(analysis.groups_without_signal)} of the groups no reward does: nothing can be learned from "
            "them, and whitening with a mean shift still gives their rollouts a small advantage."
        )
    return sentence.strip()


def _balance(analysis: Analysis) -> str:
    if len(analysis.rewards) == 1:
        return ""
    # A share above 1 is possible, if other rewards go against the sum.
    leader = max(analysis.rewards, key=lambda reward: np.nan_to_num(reward.share_sum_then_normalise, nan=-1.0))
    share = leader.share_sum_then_normalise
    if math.isnan(share):
        return ""
    decoupled = f"(under normalise-then-sum: {percent(leader.share_normalise_then_sum)})"
    if share < DOMINATING:
        return (
            f"Under sum-then-normalise (GRPO) no reward dominates: {leader.name} leads with {percent(share)} of the "
            f"advantage {decoupled}."
        )
    return (
        f"Under sum-then-normalise (GRPO) {leader.name} dominates with {percent(min(share, 1.0))} of the advantage "
        f"{decoupled}: there GDPO and GD²PO differ from GRPO whatever the conflict."
    )


def _verdict(analysis: Analysis) -> str:
    # Rollouts without any signal are no evidence of harmony: with them a saturated run would always look peaceful.
    ratio = analysis.conflict_ratio_with_signal
    if len(analysis.rewards) == 1 or not ratio >= LITTLE_CONFLICT:
        return "Verdict: with so little conflict GD²PO will behave like GDPO: expect no difference."
    if ratio < SOME_CONFLICT:
        return (
            f"Verdict: there is some conflict ({percent(ratio)} of the rollouts that carry any signal), but GD²PO "
            "will differ little from GDPO, and the difference will be hard to tell from the noise between seeds."
        )
    hard, *snr = analysis.filters
    evidence = (
        "A higher total reward is not to be expected from the evidence so far (an independent replication found Hard "
        "within the noise of GDPO); a better balance between the rewards is what to look for, over several seeds: "
        "`gd2po compare`."
    )
    if hard.kept_ratio_with_signal >= LITTLE_LEFT:
        return (
            f"Verdict: there is enough conflict for GD²PO to act on ({percent(ratio)} of the rollouts that carry any "
            f"signal). Hard would train on {percent(hard.kept_ratio)} of all rollouts, which makes updates cheaper. "
            f"{evidence}"
        )
    sentence = (
        f"Verdict: there is so much conflict that Hard would leave only {percent(hard.kept_ratio_with_signal)} of the "
        "rollouts with signal to learn from"
    )
    mildest = max(snr, key=lambda one: one.kept_ratio_with_signal, default=hard)
    if mildest.kept_ratio_with_signal > hard.kept_ratio_with_signal:
        sentence += f"; SNR at {mildest.threshold:g} would keep {percent(mildest.kept_ratio_with_signal)}"
    return f"{sentence}. {evidence}"
