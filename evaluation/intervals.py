"""How sure a mean over cases is: its deviation, its number of cases, and its 95 % interval.

The interval is a BCa bootstrap over the cases with 10 000 resamples and a fixed seed. There is none of a median.
"""

from __future__ import annotations

import functools
import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
# Below so many cases 95 % intervals hold the true mean less often.
FEW_CASES = 50
# numbers that a bootstrap holds at once
BATCH = 4_000_000


@dataclass(frozen=True)
class Mean:
    """Over `n` cases: mean, sample standard deviation (n − 1), and the ends of the mean's 95 % interval.

    None where there is none: the mean of no case, the others of fewer than two.
    """

    mean: float | None
    sd: float | None
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MeanOfClasses:
    """The mean of the means of `classes` classes, its 95 % interval, and how the means of `cases` cases spread."""

    mean: float | None
    classes: int
    sd_over_cases: float | None
    cases: int
    low: float | None = None
    high: float | None = None


def spread(values: Iterable[float]) -> Mean:
    """Mean, deviation and N of the values that are not NaN, and the 95 % interval of the mean.

    Example:
        >>> spread([1.0, 3.0, math.nan])
        Mean(mean=2.0, sd=1.4142135623730951, n=2, low=1.0, high=3.0)
    """
    known = tuple(value for value in values if not math.isnan(value))
    return Mean(
        statistics.fmean(known) if known else None,
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
        *interval(known),
    )


@functools.lru_cache(maxsize=4096)
def interval(values: tuple[float, ...]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean: BCa bootstrap, 10 000 resamples, always with the same seed.

    None for fewer than two values; the value itself where all are equal. Where BCa has no answer, as for one value
    apart from many equal ones, the percentiles are taken.

    Example:
        >>> interval((0.5, 0.5)), interval((1.0,))
        ((0.5, 0.5), (None, None))
    """
    if len(values) < 2:
        return None, None
    if min(values) == max(values):
        return values[0], values[0]
    return _bootstrap(np.asarray(values)[:, None])


def _bootstrap(values: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Of the mean of the columns' means of values (cases, classes); cases are drawn, NaN left out."""
    # the order of the cases, which follows from their names, must not change what is drawn
    values = values[np.lexsort(np.nan_to_num(values, nan=-1.0).T)]
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)

    def statistic(cases: NDArray[np.intp], axis: int = -1) -> NDArray[np.float64]:
        sums, counts = filled[cases].sum(axis - 1), known[cases].sum(axis - 1)
        means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
        return means.sum(-1) / np.maximum((counts > 0).sum(-1), 1)

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (np.arange(len(values)),), statistic, n_resamples=RESAMPLES, batch=max(1, BATCH // values.size),
                vectorized=True, axis=-1, method=method, random_state=np.random.default_rng(0),
            )  # fmt: skip
        low, high = map(float, found.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None, None


def mean_of_classes(table: NDArray[np.float64], means: list[float]) -> MeanOfClasses:
    """The mean of the classes' means, and how the cases' means over their classes spread."""
    scored = [[value for value in case if not math.isnan(value)] for case in table.tolist()]
    cases = [statistics.fmean(values) for values in scored if values]
    low = high = None
    if table.shape[1] == 1:
        low, high = interval(tuple(cases))
    elif len(cases) > 1:
        low, high = _interval_of_classes(table[~np.isnan(table).all(1)].tobytes(), table.shape[1])
    sd = statistics.stdev(cases) if len(cases) > 1 else None
    return MeanOfClasses(statistics.fmean(means) if means else None, len(means), sd, len(cases), low, high)


@functools.lru_cache(maxsize=64)
def _interval_of_classes(table: bytes, classes: int) -> tuple[float | None, float | None]:
    values = np.frombuffer(table).reshape(-1, classes)
    if all(np.ptp(column[~np.isnan(column)]) == 0 for column in values.T if not np.isnan(column).all()):
        mean = statistics.fmean(float(np.nanmean(column)) for column in values.T if not np.isnan(column).all())
        return mean, mean
    return _bootstrap(values)
