"""Statistics of a few seeds: confidence intervals, paired tests, correction for many comparisons."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


# The sign-flip test visits all sign patterns if there are at most this many, else it draws as many at random.
SIGN_PATTERNS = 20_000
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


def t_test(values: Sequence[float]) -> tuple[Interval, float]:
    """Mean and 95 % interval of independent values, one per seed, and the two-sided p-value of a mean of 0."""
    from scipy import stats

    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count), math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of equal values, whose interval is the mean
        test = stats.ttest_1samp(values, 0.0)
        low, high = test.confidence_interval()
    return Interval(mean, float(low), float(high), count), float(test.pvalue)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student-t 95 % interval of independent values, one per seed."""
    return t_test(values)[0]


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Compare two methods, of which there is one value per seed, in the same order of seeds."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    interval, p_t = t_test(differences)
    if len(differences) < 2:
        return PairedTest(interval, math.nan, math.nan)
    rounding = ROUNDING * max(np.abs(values).max(), np.abs(baseline).max())
    if np.ptp(differences) <= rounding:
        # Without spread the t statistic is 0 / 0, or infinite, which no number of seeds justifies.
        p_t = 1.0 if abs(interval.mean) <= rounding else math.nan
    return PairedTest(interval, p_t, sign_flip_test(differences))


def sign_flip_test(differences: Sequence[float]) -> float:
    """
    Two-sided p-value of the mean of `differences` if each were as likely with the opposite sign.

    Exact for up to 14 differences, beyond that from 20,000 random sign patterns with a fixed seed. NaN if a difference
    is NaN.
    """
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    if np.isnan(values).any():
        return math.nan
    values = values / max(np.abs(values).max(), np.finfo(np.float64).tiny)

    def size(flipped: np.ndarray, axis: int) -> np.ndarray:
        # Rounded, so that the last digits of a sum do not decide whether a pattern reaches the observed one.
        return np.abs(flipped.sum(axis)).round(10)

    options = {"permutation_type": "samples", "alternative": "greater", "n_resamples": SIGN_PATTERNS, "rng": 0}
    return float(stats.permutation_test((values,), size, **options).pvalue)


def smallest_sign_flip_p(count: int) -> float:
    """The lowest p-value that `sign_flip_test` can give for `count` differences."""
    return min(1.0, 2 / 2**count) if 2**count <= SIGN_PATTERNS else 1 / (SIGN_PATTERNS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values corrected for their number by Holm's step-down procedure (1979), in the given order.

    NaN (a comparison that could not be made) stays NaN and does not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)  # NaN last
    corrected = np.full(len(p), math.nan)
    factors = (~np.isnan(p)).sum() - np.arange(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(p[order] * factors, 1.0))
    return corrected.tolist()
