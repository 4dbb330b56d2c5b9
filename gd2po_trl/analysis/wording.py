"""Numbers and names as a reader wants them."""

import math
from collections.abc import Sequence


def percent(share: float) -> str:
    """`share` as a percentage, with one decimal where the whole number would say too little."""
    if math.isnan(share):
        return "–"
    value = 100 * share
    if 0 < value < 1.95 or 98.05 < value < 100:
        return f"{min(max(value, 0.1), 99.9):.1f}%"
    return f"{value:.0f}%"


def number(value: float) -> str:
    """`value` with three digits."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def join(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1] if names else ""]))


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
