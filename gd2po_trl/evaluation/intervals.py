"""What an evaluation says of its uncertainty: intervals of proportions and means, and win rates."""

import math
from collections.abc import Sequence
from typing import Any


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Wilson's score interval for a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        successes (`float`): A tie may count as half; the interval is then a little too wide, never too narrow.
        trials (`int`): Number of independent trials.
        confidence (`float`, defaults to `0.95`): Probability that the interval covers the proportion.

    Returns:
        `tuple[float, float]`: Lower and upper bound in [0, 1]; all of it without trials.
    """
    from scipy.stats import norm

    if trials == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)


def mean_and_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float | None, list[float] | None]:
    """Mean of `values` and its Student-t interval; `None` where there are too few of them."""
    from scipy import stats

    if not values:
        return None, None
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    if max(values) == min(values):  # scipy would divide 0 by 0
        return mean, [mean, mean]
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return mean, [float(interval.low), float(interval.high)]


def win_rate(pairs: Sequence[tuple[float | None, float | None]]) -> dict[str, Any]:
    """How often the first of a pair is higher: `rate` (a tie counts half), its Wilson `interval` and the counts."""
    both = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    wins = sum(ours > theirs for ours, theirs in both)
    ties = sum(ours == theirs for ours, theirs in both)
    rate = (wins + ties / 2) / len(both) if both else None
    return {
        "rate": rate,
        "interval": list(wilson_interval(wins + ties / 2, len(both))),
        "wins": wins,
        "ties": ties,
        "losses": len(both) - wins - ties,
    }
