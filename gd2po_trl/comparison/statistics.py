"""Small-sample statistics: confidence intervals over seeds, paired tests, correction for many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


# Up to this many pairs the sign-flip test visits all 2^n sign patterns; beyond, it draws this many at random.
EXACT_PAIRS = 14
RANDOM_FLIPS = 20_000
# Differences that vary by less than this share of the compared values are equal but for rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """
    A mean with its confidence interval; NaN bounds where there are too few values for one.

    Args:
        mean (`float`): Mean of the values.
        low (`float`), high (`float`): Bounds of the interval, from Student's t.
        count (`int`): How many values there are.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class PairedTest:
    """
    The difference between two methods over the seeds that both of them finished.

    Args:
        difference ([`Interval`]): Mean difference and its interval.
        p_t (`float`): Two-sided p-value of the paired t-test. Where all differences are equal, which leaves it
            undefined, 1 if they are 0 and else NaN.
        p_sign_flip (`float`): Two-sided p-value of the sign-flip permutation test of the mean, which assumes no normal
            distribution. It cannot be below `smallest_sign_flip_p` of the number of pairs.
    """

    difference: Interval
    p_t: float
    p_sign_flip: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """
    Mean and Student-t confidence interval of independent values.

    Args:
        values (sequence of `float`): One value per seed, all finite.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval.
    """
    from scipy import stats

    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half, count)


def paired_test(values: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> PairedTest:
    """
    Compare two methods seed by seed.

    Args:
        values (sequence of `float`), baseline (sequence of `float`): One value per seed, in the same order of seeds.
        confidence (`float`, *optional*, defaults to `0.95`): Coverage of the interval of the difference.

    Raises:
        `ValueError`: if the two differ in length.
    """
    import numpy as np
    from scipy import stats

    if len(values) != len(baseline):
        raise ValueError(f"A paired test needs pairs; there are {len(values)} and {len(baseline)} values.")
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    interval = mean_interval(differences, confidence)
    if len(differences) < 2:
        return PairedTest(interval, math.nan, math.nan)
    rounding = ROUNDING * max(np.abs(values).max(), np.abs(baseline).max())
    if np.ptp(differences) <= rounding:
        # No spread: the t statistic is 0 / 0, or infinite, which no number of seeds justifies.
        p_t = 1.0 if abs(interval.mean) <= rounding else math.nan
    else:
        p_t = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedTest(interval, p_t, sign_flip_test(differences))


def sign_flip_test(differences: Sequence[float]) -> float:
    """
    Two-sided p-value of the mean of `differences` if each were as likely with the opposite sign.

    Exact for up to 14 differences, beyond that from 20,000 random sign patterns with a fixed seed. NaN if a difference
    is NaN.
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    observed = abs(values.sum())
    if np.isnan(observed):
        return math.nan
    # Rounding must not decide whether a pattern reaches the observed sum.
    tolerance = 1e-9 * max(np.abs(values).sum(), np.finfo(np.float64).tiny)
    if count <= EXACT_PAIRS:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        sums = np.abs((1 - 2 * patterns) @ values)
        return float((sums >= observed - tolerance).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RANDOM_FLIPS, count))
    reached = int((np.abs(signs @ values) >= observed - tolerance).sum())
    return (reached + 1) / (RANDOM_FLIPS + 1)


def smallest_sign_flip_p(count: int) -> float:
    """The lowest p-value that `sign_flip_test` can give for `count` differences."""
    return min(1.0, 2 / 2**count) if count <= EXACT_PAIRS else 1 / (RANDOM_FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values corrected for their number by Holm's step-down procedure (1979), in the given order.

    NaN (a comparison that could not be made) stays NaN and does not count.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected
