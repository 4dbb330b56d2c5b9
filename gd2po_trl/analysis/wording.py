"""Numbers and names as a reader wants them."""

import math


def number(value: float) -> str:
    """`value` with three digits."""
    return "–" if math.isnan(value) else f"{value:.3g}"


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
