"""How sure a figure is: 95 % intervals by resampling pictures.

Lines about one picture share what the model made of it, so they are not independent: what is drawn again, with replacement,
is whole pictures, each with all of its lines. The ends are percentiles of 4000 such suites, drawn from a fixed seed. Two builds
are compared on the same draws, so what is hard about a picture cancels. Where every picture says the same the interval has no
width: it knows nothing of pictures that the suite does not have.
Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, sections 8.6 and 13.3; scipy.stats.bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from ..errors import InputError, MachineError

CONFIDENCE = 0.95
RESAMPLES = 4000
_SEED = 0


class Interval(msgspec.Struct, frozen=True):
    """A figure and the ends of its 95 % interval, in the figure's own unit."""

    value: float
    low: float
    high: float

    def map(self, rising: Callable[[float], float]) -> Interval:
        """Return the interval of a rising function of the figure."""
        return Interval(rising(self.value), rising(self.low), rising(self.high))


def interval_of_sums(function: Callable[..., Any], *columns: np.ndarray) -> Interval:
    """Return a function of the columns' sums and its interval.

    Args:
        function: takes as many arrays of one shape as there are columns, sums over pictures, and returns such an array.
        columns: of each picture one number, (pictures,) each.

    Raises:
        InputError: fewer than two pictures. MachineError: scipy is not installed.
    """
    _require_several(len(columns[0]))
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MachineError(f"intervals need {error.name}; install it with: pip install 'cobra-edge[eval]'") from error

    def statistic(*drawn: np.ndarray, axis: int = -1) -> Any:
        return function(*(column.sum(axis) for column in drawn))

    wide = [np.asarray(column, np.float64) for column in columns]
    found = bootstrap(
        wide,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return Interval(float(statistic(*wide)), float(found.low), float(found.high))


def mean(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """Return the mean over all tokens (or lines) of a measure, from each picture's sum and count, (pictures,) each."""
    counted = counts > 0  # a picture that has none of what is averaged is no part of this sample
    return interval_of_sums(np.divide, sums[counted], counts[counted])


def difference_of_means(sums: np.ndarray, other: np.ndarray, counts: np.ndarray) -> Interval:
    """Return mean(sums) - mean(other) over the same tokens, paired; arrays are (pictures,)."""
    counted = counts > 0
    return interval_of_sums(lambda a, b, n: (a - b) / n, sums[counted], other[counted], counts[counted])


def ratio_of_means(sums: np.ndarray, other: np.ndarray) -> Interval:
    """Return mean(sums) / mean(other) over the same tokens, paired; arrays are (pictures,), other's sum not 0."""
    return interval_of_sums(np.divide, sums, other)


def quantile(groups: Sequence[np.ndarray], q: float) -> Interval:
    """Return the q-quantile of all values and its interval.

    Args:
        groups: of each picture its tokens' values, (tokens,) each, not all of one length: more than `interval_of_sums` takes.
        q: 0 to 1.

    Raises:
        InputError: fewer than two pictures.
    """
    _require_several(len(groups))
    random = np.random.default_rng(_SEED)
    drawn = [
        np.quantile(np.concatenate([groups[i] for i in picks]), q)
        for picks in random.integers(0, len(groups), (RESAMPLES, len(groups)))
    ]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.quantile(np.concatenate(list(groups)), q)), float(low), float(high))


def _require_several(pictures: int) -> None:
    if pictures < 2:
        raise InputError(f"an interval needs two or more pictures to draw from, got {pictures}; give a larger suite")
