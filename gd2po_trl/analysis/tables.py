"""The tables of the report, once, as plain text cells: for the terminal and for HTML alike."""

import math
from itertools import pairwise

from ..reporting import Table, percent
from .results import Analysis
from .wording import number


# Rows of the table over training.
PERIODS = 5


def tables(analysis: Analysis) -> list[Table]:
    """The tables that apply to `analysis`. None is wider than a terminal of 80 columns."""
    chosen = [_rewards(analysis)]
    if len(analysis.rewards) > 1:
        chosen += [_shares(analysis), _pairs(analysis), _filters(analysis), _consensus(analysis)]
        if len(analysis.over_steps.step) > 1:
            chosen += [_course(analysis), _reward_course(analysis)]
    return chosen


def _rewards(analysis: Analysis) -> Table:
    # A column of 100 % would take its room from the names.
    some_unscored = any(one.scored < 1 for one in analysis.rewards)
    return Table(
        "Rewards",
        ["reward", "weight", *(["scored"] if some_unscored else []), "mean", "min", "max", "spread", "constant"],
        [
            [
                one.name,
                f"{one.weight:g}",
                *([percent(one.scored)] if some_unscored else []),
                *(number(value) for value in (one.mean, one.minimum, one.maximum, one.spread)),
                percent(one.groups_without_signal),
            ]
            for one in analysis.rewards
        ],
        help=(
            "“spread”: standard deviation within the groups in which the reward varies. “constant”: share of groups "
            "in which all rollouts get the same value, or none; they teach nothing of this reward."
        ),
    )


def _shares(analysis: Analysis) -> Table:
    return Table(
        "Which reward decides",
        ["reward", "summed first (GRPO)", "normalized first (GDPO)"],
        [
            [one.name, percent(one.share_sum_then_normalise), percent(one.share_normalise_then_sum)]
            for one in analysis.rewards
        ],
        help=(
            "Share of the squared advantage that comes from each reward. A negative one belongs to a reward that "
            "loses against the others."
        ),
    )


def _pairs(analysis: Analysis) -> Table:
    return Table(
        "Pairs of rewards",
        ["first / second", "conflict", "1st favors", "2nd favors", "by chance", "corr."],
        [
            [
                f"{one.first} / {one.second}",
                percent(one.conflict_ratio),
                percent(one.first_up),
                percent(one.second_up),
                percent(one.unrelated_ratio),
                "–" if math.isnan(one.correlation) else f"{one.correlation:+.2f}",
            ]
            for one in sorted(analysis.pairs, key=lambda pair: -pair.conflict_ratio)
        ],
        help=(
            "Shares of all scored rollouts. “1st favors”: the first gives a positive advantage, the second a negative "
            "one. “by chance”: what shuffling each reward within its groups would give. “corr.”: correlation of the "
            "values within groups."
        ),
    )


def _filters(analysis: Analysis) -> Table:
    return Table(
        "What the filters would keep",
        ["filter", "rollouts", "of those with advantage", "summed advantages", "emptied groups"],
        [
            [
                one.label,
                percent(one.kept_ratio),
                percent(one.kept_ratio_with_signal),
                percent(one.kept_push),
                percent(one.emptied_groups),
            ]
            for one in analysis.filters
        ],
        help=(
            "“of those with advantage”: of the rollouts to which some reward gives an advantage. “summed advantages”: "
            "of the sum of |advantage| over the rollouts. “emptied groups”: of those with an advantage, the groups "
            "that keep no rollout."
        ),
    )


def _consensus(analysis: Analysis) -> Table:
    return Table(
        "Consensus weight",
        ["filter", "none", "≤1/4", "≤1/2", "≤3/4", "<1", "all", "mean"],
        [
            [one.label, *(percent(share) for share in one.consensus_distribution), number(one.consensus_mean)]
            for one in analysis.filters
        ],
        help=(
            "Share of groups, by the share of their rollouts that the filter keeps. GD²PO multiplies a group's "
            "advantages by that share."
        ),
    )


def _periods(analysis: Analysis) -> list[tuple[str, slice]]:
    steps = analysis.over_steps.step
    parts = min(PERIODS, len(steps))
    bounds = [len(steps) * part // parts for part in range(parts + 1)]
    return [
        (str(steps[start]) if stop - start == 1 else f"{steps[start]} to {steps[stop - 1]}", slice(start, stop))
        for start, stop in pairwise(bounds)
    ]


def _course(analysis: Analysis) -> Table:
    over = analysis.over_steps
    series = (over.conflict_ratio, over.unrelated_ratio, over.cancellation, over.groups_without_signal)
    return Table(
        "Over training",
        ["steps", "rollouts", "conflict", "by chance", "cancels out", "no reward varies"],
        [
            [
                name,
                f"{sum(over.rollouts[part]):,}",
                *(percent(_mean(values[part], over.rollouts[part])) for values in series),
            ]
            for name, part in _periods(analysis)
        ],
        help=(
            "Steps are pooled into equal parts; report.json has every step. “cancels out”: share of the rewards' "
            "advantages that is gone in their sum. “no reward varies”: share of groups."
        ),
    )


def _reward_course(analysis: Analysis) -> Table:
    over = analysis.over_steps
    periods = _periods(analysis)
    return Table(
        "Mean reward over training",
        ["reward", *(name for name, _ in periods)],
        [
            [reward, *(number(_mean(values[part], over.rollouts[part])) for _, part in periods)]
            for reward, values in over.reward_mean.items()
        ],
        help="Per range of steps. As logged, before the weights.",
    )


def _mean(values: list[float], weights: list[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan
