"""How sure a figure is: intervals of shares and means, and of anything that can be computed again from a resample."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and the interval that holds the true one as often as its level says."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'


def share(hits: int, of: int, level: float = LEVEL) -> Estimate:
    """Of things that are so or not: Wilson's interval (1927), which holds for few things and near 0 and 1, too."""
    if not of:
        return Estimate(np.nan, np.nan, np.nan)
    found = stats.binomtest(hits, of).proportion_ci(level, method='wilson')
    return Estimate(hits / of, float(found.low), float(found.high))


def mean(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """By Student's t; of a single value the interval is everything."""
    given = np.asarray(values, np.float64)
    if not given.size:
        return Estimate(np.nan, np.nan, np.nan)
    middle = float(given.mean())
    if given.size == 1:
        return Estimate(middle, -np.inf, np.inf)
    reach = float(stats.t.ppf((1 + level) / 2, given.size - 1) * given.std(ddof=1) / np.sqrt(given.size))
    return Estimate(middle, middle - reach, middle + reach)


def resampled(value: float, draws: np.ndarray, level: float = LEVEL) -> Estimate:
    """The percentile bootstrap (Efron, 1979): `draws` are the figure of each resample.

    Resamples in which it is NaN are left out. A bound is one of the draws, so that infinite ones may be among them.
    """
    known = draws[~np.isnan(draws)]
    if not known.size:
        return Estimate(value, np.nan, np.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], method='inverted_cdf')
    return Estimate(value, float(low), float(high))
