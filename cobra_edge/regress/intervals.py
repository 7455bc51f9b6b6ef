"""How sure a figure is: 95 % intervals from a suite's images.

Lines about one image share what the model made of it, so they are not independent: what is drawn again, with replacement,
is whole images, each with all of its lines. Two builds are compared on the same images, so what is hard about one cancels.
Three methods, chosen by how often they hold the full suite's value (docs/regress-intervals.md, `python -m
bench.interval_coverage`):

- Means, ratios and roots of ratios: the symmetric bootstrap-t, of the logarithm where a measure cannot be negative. Each drawn
  suite's distance from ours is measured in its own standard error, because a suite that has missed the rare large values errs
  low and believes itself sure. Never narrower than Student's t.
  Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 12.5; Hall, "On Symmetric Bootstrap
  Confidence Intervals", 1988; DiCiccio and Efron, "Bootstrap Confidence Intervals", 1996, section 4.
- Shares: Wilson's score interval, with as many answers as independent ones would have to be to vary as images make it vary.
  It has a width where nothing failed. A paired difference of shares: Tango's score interval.
  Source: Wilson, "Probable Inference", 1927; Kish, "Survey Sampling", 1965, section 8.2 (design effect); Tango, "Equivalence
  Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design", 1998.
- Quantiles: every value of which Wilson's test, with the design effect there, would not refuse that a share q lies below it.
  Source: Woodruff, "Confidence Intervals for Medians and Other Position Measures", 1952; by test inversion: Francisco and
  Fuller, "Quantile Estimation with a Complex Survey Design", 1991.

Where every image says the same a mean's interval has no width: it knows nothing of images that the suite does not have.
Where a value is not finite, neither is the figure: NaN, and NaN at both ends.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError

CONFIDENCE = 0.95
RESAMPLES = 4000
_SEED = 0
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_DRAWN_AT_ONCE = 1 << 20  # images; 8 MiB
_ROUNDING = 1e-12  # relative; a spread below it is no spread
_NO_SPREAD = 1e-5  # the same of a standard error, beside our own: squares that cancel leave the root of a rounding


class Interval(msgspec.Struct, frozen=True):
    """A figure and the ends of its 95 % interval, in the figure's own unit."""

    value: float
    low: float
    high: float

    def map(self, rising: Callable[[float], float]) -> Interval:
        """Return the interval of a rising function of the figure."""
        return Interval(rising(self.value), rising(self.low), rising(self.high))


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def interval_of_sums(function: Callable[..., Any], *columns: np.ndarray, positive: bool = False) -> Interval:
    """Return a smooth function of the columns' sums and its interval.

    Args:
        function: takes as many arrays of one shape as there are columns, sums over images, and returns such an array.
        columns: of each image one number, (images,) each.
        positive: the function cannot be below 0; the ends then lie as far from the value by their ratio as by it.

    Raises:
        InputError: fewer than two images. MachineError: scipy is not installed.
    """
    rows = np.stack([np.asarray(column, np.float64) for column in columns], -1)
    _require_several(len(rows))
    with np.errstate(all="ignore"):  # what a drawn suite without spread leads to is left out below
        value = float(function(*rows.sum(0)))
        if not (np.isfinite(rows).all() and math.isfinite(value)):
            return _UNKNOWN
        by_ratio = positive and value > 0
        own = float(_with_error(function, rows, np.ones((1, len(rows))))[1][0])
        if not own > _ROUNDING * abs(value):
            return Interval(value, value, value)
        found = [_with_error(function, rows, weights) for weights in _draws(len(rows))]
        values, errors = (np.concatenate(parts) for parts in zip(*found, strict=True))
        away = np.log(values / value) / (errors / values) if by_ratio else (values - value) / errors
        away = np.abs(away[np.isfinite(away) & (errors > _NO_SPREAD * own)])
        drawn = float(np.quantile(away, CONFIDENCE)) if len(away) else 0.0
        reach = max(drawn, _student(len(rows) - 1)) * own
        factor = float(np.exp(reach / value)) if by_ratio else math.nan
    return Interval(value, value / factor, value * factor) if by_ratio else Interval(value, value - reach, value + reach)


def _with_error(function: Callable[..., Any], rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the function's value and standard error in each drawn suite, (suites,) each.

    The error is the linearised one: the covariance of the sums between the function's slopes.

    Args:
        function: as above.
        rows: (images, columns) float64.
        weights: (suites, images) float64, how often each image was drawn.
    """
    n, k = rows.shape
    centre = rows.mean(0)
    off = rows - centre  # so that little is lost where all values lie close together
    moved = weights @ off
    squares = (weights @ (off[:, :, None] * off[:, None, :]).reshape(n, k * k)).reshape(-1, k, k)
    covariance = (squares - moved[:, :, None] * moved[:, None, :] / n) * (n / (n - 1))
    sums = moved + n * centre
    slopes = np.zeros_like(sums)
    for column, step in enumerate(1e-4 * np.sqrt(n) * off.std(0)):
        if step > 0:
            up, down = sums.copy(), sums.copy()
            up[:, column] += step
            down[:, column] -= step
            slopes[:, column] = (function(*up.T) - function(*down.T)) / (2 * step)
    variance = np.einsum("si,sij,sj->s", slopes, covariance, slopes)
    return function(*sums.T), np.sqrt(np.maximum(variance, 0))


def _draws(images: int) -> Iterator[np.ndarray]:
    """Yield how often each image was drawn, (suites, images) float64: RESAMPLES suites, a piece at a time."""
    size = max(1, _DRAWN_AT_ONCE // images)
    for start in range(0, RESAMPLES, size):
        yield _drawn(images, start, min(size, RESAMPLES - start))


@functools.lru_cache(maxsize=1)  # all measures of a suite of common size use the same piece
def _drawn(images: int, start: int, suites: int) -> np.ndarray:
    picks = np.random.default_rng((_SEED, start)).integers(0, images, (suites, images))
    picks += images * np.arange(suites)[:, None]
    counts = np.bincount(picks.ravel(), minlength=suites * images).reshape(suites, images).astype(np.float64)
    counts.flags.writeable = False
    return counts


@functools.lru_cache(maxsize=16)
def _student(freedom: int) -> float:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MachineError(f"intervals need {error.name}; install it with: {install_hint('regress')}") from error
    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


def mean(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """Return the mean over all tokens (or lines) of a measure, from each image's sum and count, (images,) each.

    Where no sum is negative the measure is taken for one that cannot be.
    """
    counted = counts > 0  # an image that has none of what is averaged is no part of this sample
    return interval_of_sums(np.divide, sums[counted], counts[counted], positive=bool((sums[counted] >= 0).all()))


def difference_of_means(sums: np.ndarray, other: np.ndarray, counts: np.ndarray) -> Interval:
    """Return mean(sums) - mean(other) over the same tokens, paired; arrays are (images,)."""
    counted = counts > 0
    return interval_of_sums(lambda a, b, n: (a - b) / n, sums[counted], other[counted], counts[counted])


def ratio_of_means(sums: np.ndarray, other: np.ndarray) -> Interval:
    """Return mean(sums) / mean(other) over the same tokens, paired; arrays are (images,), not negative, other's sum not 0."""
    return interval_of_sums(np.divide, sums, other, positive=True)


def root_ratio(num: np.ndarray, den: np.ndarray) -> Interval:
    """Return sqrt(sum(num) / sum(den)), a relative or root mean square; arrays are (images,), not negative."""
    return ratio_of_means(num, den).map(math.sqrt)


def share(right: np.ndarray, counts: np.ndarray) -> Interval:
    """Return the share of tokens (or lines) that are right, from each image's, (images,) each.

    Raises:
        InputError: fewer than two images with any.
    """
    counted = counts > 0
    right, counts = (np.asarray(column, np.float64)[counted] for column in (right, counts))
    _require_several(len(counts))
    value = float(right.sum() / counts.sum())
    if not math.isfinite(value):
        return _UNKNOWN
    effect = _design_effect(right, counts, value * (1 - value))
    return Interval(value, *_wilson(value, effect / float(counts.sum())))


def difference_of_shares(gained: np.ndarray, lost: np.ndarray, counts: np.ndarray) -> Interval:
    """Return by how much the share of right lines rose, paired: right now and not before, less right before and not now.

    Args:
        gained, lost: of each image how many lines became right and wrong, (images,) each.
        counts: of each image how many lines there are, (images,).

    Raises:
        InputError: fewer than two images with any. MachineError: scipy is not installed.
    """
    counted = counts > 0
    up, down, counts = (np.asarray(column, np.float64)[counted] for column in (gained, lost, counts))
    _require_several(len(counts))
    rose, fell, total = (float(column.sum()) for column in (up, down, counts))
    risen = (rose - fell) / total
    if not math.isfinite(risen):
        return _UNKNOWN
    effect = _design_effect(up - down, counts, (rose + fell) / total - risen**2)
    return Interval(risen, *_tango(rose / effect, fell / effect, total / effect))


def quantile(groups: Sequence[np.ndarray], q: float) -> Interval:
    """Return the q-quantile of all values and its interval; see `quantiles`."""
    return quantiles(groups, [q])[0]


def quantiles(groups: Sequence[np.ndarray], qs: Sequence[float]) -> list[Interval]:
    """Return quantiles of all values, each with its interval.

    Args:
        groups: of each image its tokens' values, (tokens,) each, not all of one length.
        qs: 0 to 1 each.

    Raises:
        InputError: fewer than two images with any.
    """
    filled = [group for group in groups if len(group)]
    _require_several(len(filled))
    values, counts = np.concatenate(filled).astype(np.float64), np.array([len(group) for group in filled])
    if not np.isfinite(values).all():
        return [_UNKNOWN] * len(qs)
    order = np.argsort(values, kind="stable")
    return [_quantile(values[order], np.repeat(np.arange(len(counts)), counts)[order], counts, q) for q in qs]


def _quantile(values: np.ndarray, image: np.ndarray, counts: np.ndarray, q: float) -> Interval:
    """Return one quantile of sorted values, (tokens,), of which `image` is (tokens,) int; counts are (images,)."""
    total = len(values)

    def reach(below: int) -> float:
        """Return how far from q the share of values below may lie, were q the truth: Wilson's test."""
        part = below / total
        effect = _design_effect(np.bincount(image[:below], minlength=len(counts)), counts, part * (1 - part))
        return _Z * math.sqrt(q * (1 - q) * effect / total)

    first = bisect_left(range(total - 1), True, key=lambda i: (i + 1) / total + reach(i + 1) >= q)
    after = bisect_left(range(1, total), True, key=lambda i: i / total - reach(i) > q)
    value = float(np.quantile(values, q))
    return Interval(value, min(float(values[first]), value), max(float(values[after]), value))


def _design_effect(of_images: np.ndarray, counts: np.ndarray, own: float) -> float:
    """Return how many times the variance of sum(of_images) / sum(counts) is what independent lines would give.

    Where images do not differ it cannot be seen, and is taken as 1. `own` is the variance of one line.
    """
    n, total = len(counts), counts.sum()
    off = of_images - of_images.sum() / total * counts
    variance = float((off**2).sum() * n / (n - 1) / total)
    return variance / own if own > 0 and variance > _ROUNDING**2 * total else 1.0


def _wilson(part: float, one_over_n: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a share of n independent answers."""
    wide = _Z**2 * one_over_n
    middle, half = part + wide / 2, math.sqrt(wide * part * (1 - part) + wide**2 / 4)
    low, high = (middle - half) / (1 + wide), (middle + half) / (1 + wide)
    return max(min(low, part), 0.0), min(max(high, part), 1.0)  # of 0 and 1 rounding could leave the share outside


def _tango(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the ends of Tango's interval of (gained - lost) / n: what a score test would not refuse."""
    try:
        from scipy.optimize import brentq
    except ImportError as error:
        raise MachineError(f"intervals need {error.name}; install it with: {install_hint('regress')}") from error
    risen = (gained - lost) / n

    def score(rise: float) -> float:
        b = (2 * n - gained + lost) * rise - gained - lost
        root = math.sqrt(max(b * b + 8 * n * lost * rise * (1 - rise), 0.0))
        share_lost = (root - b) / (4 * n)  # the likeliest, were `rise` the truth
        variance = n * (2 * share_lost + rise * (1 - rise))
        off = gained - lost - n * rise
        return off / math.sqrt(variance) if variance > 1e-12 * n else math.copysign(math.inf if off else 0.0, off)

    def end(far: float, sign: int) -> float:
        if abs(risen - far) < _ROUNDING:
            return far
        return float(brentq(lambda rise: min(sign * score(rise), 2 * _Z) - _Z, far, risen, xtol=1e-12))

    return end(-1.0, 1), end(1.0, -1)


def _require_several(images: int) -> None:
    if images < 2:
        raise InputError(f"an interval needs two or more images to draw from, got {images}; give a larger suite")
