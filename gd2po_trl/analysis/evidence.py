"""The evidence of a report as plain text: a handful of sentences, the tables, and rollouts to read."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..advantages import SIGN_EPS
from ..reporting import Table, join, percent, short_number
from ..terminal import shorten
from .groups import Groups
from .measures import RECENT, Normalized
from .reading import Rollouts, read_texts
from .records import Analysis, FilterFigures, PairFigures, RewardFigures


# Fewer groups than this, and the figures are called rough.
FEW_GROUPS = 100
# Rows of the table over training.
PERIODS = 5
# Texts of examples are cut in the middle to this many characters.
TEXT_LENGTH = 4000


# Sentences


def summarize(analysis: Analysis) -> list[str]:
    """What the rollouts are, how far the rewards conflict in them, and what the filters would make of it."""
    sentences = [_data(analysis)]
    if len(analysis.rewards) > 1:
        sentences += [_conflict(analysis), _chance(analysis), _course(analysis), _filters(analysis)]
    if analysis.groups_without_signal >= 0.2:
        sentences.append(
            f"In {percent(analysis.groups_without_signal)} of the groups no reward varies: nothing can be learned "
            "from them, and whitening with a mean shift still gives their rollouts a small advantage."
        )
    return list(filter(None, sentences))


def _data(analysis: Analysis) -> str:
    size = (
        f"{analysis.rollouts:,} rollouts in {analysis.groups:,} groups of {analysis.group_size}, "
        f"{analysis.steps:,} logged step{'s' if analysis.steps != 1 else ''}."
    )
    return size + (" So few groups make every figure a rough one." if analysis.groups < FEW_GROUPS else "")


def _conflict(analysis: Analysis) -> str:
    if math.isnan(analysis.conflict_ratio):
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


def interval(share: float, error: float) -> tuple[float, float]:
    """
    The 95 % interval of a share with standard error `error` (Wilson's, for as many independent observations as would
    give that error): never below 0 or above 1.
    """
    if not error > 0:
        return share, share
    z, count = 1.96, share * (1 - share) / error**2
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(center - half, 0.0), min(center + half, 1.0)


def _chance(analysis: Analysis) -> str:
    expected, observed = analysis.unrelated_ratio, analysis.conflict_ratio
    if not expected > 0:
        return ""
    meanings = {
        0.6: "these mostly pull the same way",
        0.9: "these pull the same way more often than chance would have it",
        1.1: "these are about unrelated, which is not the same as opposed",
        math.inf: "these work against each other more than chance would have it",
    }
    meaning = next(text for bound, text in meanings.items() if observed / expected <= bound)
    return f"Rewards that had nothing to do with each other would disagree on {percent(expected)} of them: {meaning}."


def _course(analysis: Analysis) -> str:
    over = analysis.over_steps
    if len(over.step) < 5 or not analysis.conflict_ratio > 0:
        return ""
    part = max(len(over.step) // 5, 1)
    early, late = (_mean(over.conflict_ratio[cut], over.rollouts[cut]) for cut in (slice(part), slice(-part, None)))
    # Roughly: the two parts hold a fifth of the groups each.
    noise = 2 * analysis.conflict_ratio_error * math.sqrt(2 * len(over.step) / part)
    change = "stays about the same" if abs(late - early) <= noise else "rises" if late > early else "falls"
    span = f"({percent(early)} in the first fifth of the steps, {percent(late)} in the last)"
    return f"Over the run the conflict {change} {span}."


def _filters(analysis: Analysis) -> str:
    if not analysis.conflict_ratio > 0:
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


# Tables


def tables(analysis: Analysis) -> list[Table]:
    """The tables that apply to `analysis`. None is wider than a terminal of 80 columns."""
    chosen = [_rewards_table(analysis.rewards)]
    if len(analysis.rewards) > 1:
        chosen += [_shares_table(analysis.rewards), _pairs_table(analysis.pairs)]
        chosen += [_filters_table(analysis.filters), _consensus_table(analysis.filters)]
        if len(analysis.over_steps.step) > 1:
            chosen += _course_tables(analysis)
    return chosen


def _rewards_table(rewards: list[RewardFigures]) -> Table:
    # A column of 100 % would take its room from the names.
    some_unscored = any(one.scored < 1 for one in rewards)
    rows = [
        [
            one.name,
            f"{one.weight:g}",
            *([percent(one.scored)] if some_unscored else []),
            *map(short_number, (one.mean, one.minimum, one.maximum, one.spread)),
            percent(one.groups_without_signal),
        ]
        for one in rewards
    ]
    return Table(
        "Rewards",
        ["reward", "weight", *(["scored"] if some_unscored else []), "mean", "min", "max", "spread", "constant"],
        rows,
        "“spread”: standard deviation within the groups in which the reward varies. “constant”: share of groups "
        "in which all rollouts get the same value, or none; they teach nothing of this reward.",
    )


def _shares_table(rewards: list[RewardFigures]) -> Table:
    return Table(
        "Which reward decides",
        ["reward", "summed first (GRPO)", "normalized first (GDPO)"],
        [[one.name, percent(one.share_sum_then_normalise), percent(one.share_normalise_then_sum)] for one in rewards],
        "Share of the squared advantage that comes from each reward. A negative one belongs to a reward that loses "
        "against the others.",
    )


def _pairs_table(pairs: list[PairFigures]) -> Table:
    return Table(
        "Pairs of rewards",
        ["first / second", "conflict", "1st favors", "2nd favors", "by chance", "corr."],
        [
            [
                f"{one.first} / {one.second}",
                *map(percent, (one.conflict_ratio, one.first_up, one.second_up, one.unrelated_ratio)),
                "–" if math.isnan(one.correlation) else f"{one.correlation:+.2f}",
            ]
            for one in sorted(pairs, key=lambda pair: -pair.conflict_ratio)
        ],
        "Shares of all scored rollouts. “1st favors”: the first gives a positive advantage, the second a negative "
        "one. “by chance”: what shuffling each reward within its groups would give. “corr.”: correlation of the "
        "values within groups.",
    )


def _filters_table(filters: list[FilterFigures]) -> Table:
    return Table(
        "What the filters would keep",
        ["filter", "rollouts", "of those with advantage", "summed advantages", "emptied groups"],
        [
            [
                one.label,
                *map(percent, (one.kept_ratio, one.kept_ratio_with_signal, one.kept_push, one.emptied_groups)),
            ]
            for one in filters
        ],
        "“of those with advantage”: of the rollouts to which some reward gives an advantage. “summed advantages”: of "
        "the sum of |advantage| over the rollouts. “emptied groups”: of those with an advantage, the groups that keep "
        "no rollout.",
    )


def _consensus_table(filters: list[FilterFigures]) -> Table:
    return Table(
        "Consensus weight",
        ["filter", "none", "≤1/4", "≤1/2", "≤3/4", "<1", "all", "mean"],
        [[one.label, *map(percent, one.consensus_distribution), short_number(one.consensus_mean)] for one in filters],
        "Share of groups, by the share of their rollouts that the filter keeps. GD²PO multiplies a group's advantages "
        "by that share.",
    )


def _course_tables(analysis: Analysis) -> list[Table]:
    over, steps = analysis.over_steps, analysis.over_steps.step
    count = min(PERIODS, len(steps))
    cuts = [slice(*bounds) for bounds in pairwise(len(steps) * part // count for part in range(count + 1))]
    names = [" to ".join(dict.fromkeys([str(steps[cut.start]), str(steps[cut.stop - 1])])) for cut in cuts]
    series = (over.conflict_ratio, over.unrelated_ratio, over.cancellation, over.groups_without_signal)
    conflict = Table(
        "Over training",
        ["steps", "rollouts", "conflict", "by chance", "cancels out", "no reward varies"],
        [
            [
                name,
                f"{sum(over.rollouts[cut]):,}",
                *(percent(_mean(values[cut], over.rollouts[cut])) for values in series),
            ]
            for name, cut in zip(names, cuts, strict=True)
        ],
        "Steps are pooled into equal parts; report.json has every step. “cancels out”: share of the rewards' "
        "advantages that is gone in their sum. “no reward varies”: share of groups.",
    )
    means = [
        [reward, *(short_number(_mean(values[cut], over.rollouts[cut])) for cut in cuts)]
        for reward, values in over.reward_mean.items()
    ]
    help = "Per range of steps. As logged, before the weights."
    return [conflict, Table("Mean reward over training", ["reward", *names], means, help)]


def _mean(values: list[float], weights: list[int]) -> float:
    known = ~np.isnan(values)
    total: float = np.sum(weights, where=known)
    return float(np.sum(np.multiply(values, weights), where=known) / total) if total else math.nan


# Rollouts to read


@dataclass(frozen=True)
class Example:
    """
    A rollout on which two rewards disagree.

    Args:
        favoured_by, penalised_by (`str`): The two rewards.
        step (`int`): Training step.
        rewards, advantages (`dict[str, float]`): Value of each reward, and its normalized, weighted advantage.
        agreement (`float`): Signed share of the advantages on which all rewards agree.
        prompt, completion (`str`): The texts, cut in the middle if they are long.
    """

    favoured_by: str
    penalised_by: str
    step: int
    rewards: dict[str, float]
    advantages: dict[str, float]
    agreement: float
    prompt: str
    completion: str


def find_examples(
    rollouts: Rollouts, groups: Groups, normalized: Normalized, analysis: Analysis, count: int = 6
) -> list[Example]:
    """
    The strongest conflicts of the most conflicting pairs of rewards, each from another prompt, from recent steps: the
    completions of today say more than those of an untrained policy. At most `count` of them.
    """
    directions = []
    for pair in analysis.pairs:
        directions += [(pair.first_up, pair.first, pair.second), (pair.second_up, pair.second, pair.first)]
    directions = [direction for direction in sorted(directions, reverse=True)[:count] if direction[0] > 0]
    names = rollouts.reward_names
    row_step = groups.steps[groups.index]
    recent = row_step >= np.quantile(np.unique(groups.steps), 1 - RECENT)
    prompt = rollouts.prompt[groups.order] if rollouts.layout.prompt is not None else groups.index
    chosen: list[tuple[int, str, str]] = []
    seen: set[int] = set()
    for _, up, down in directions:
        strength = np.minimum(normalized.weighted[:, names.index(up)], -normalized.weighted[:, names.index(down)])
        candidates = np.flatnonzero(recent & (strength > SIGN_EPS))
        if len(candidates) == 0:
            candidates = np.flatnonzero(strength > SIGN_EPS)
        # More than enough of the strongest to find some of different prompts; the latest of equals first.
        strongest = candidates[np.lexsort((-row_step[candidates], -strength[candidates]))][: 64 * count]
        for _ in range(max(count // len(directions), 1)):
            row = next((row for row in strongest.tolist() if int(prompt[row]) not in seen), None)
            if row is not None:
                seen.add(int(prompt[row]))
                chosen.append((row, up, down))
    texts = read_texts(rollouts, [int(groups.order[row]) for row, _, _ in chosen])
    return [
        Example(
            favoured_by=up,
            penalised_by=down,
            step=int(row_step[row]),
            rewards=dict(zip(names, rollouts.rewards[groups.order[row]].tolist(), strict=True)),
            advantages=dict(zip(names, normalized.weighted[row].tolist(), strict=True)),
            agreement=float(normalized.agreement[row]),
            prompt=shorten(prompt_text, TEXT_LENGTH),
            completion=shorten(completion, TEXT_LENGTH),
        )
        for (row, up, down), (prompt_text, completion) in zip(chosen, texts, strict=True)
    ]
