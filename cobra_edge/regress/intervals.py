"""95 % confidence intervals of figures, clustered by image.

Lines about one image share its embeddings, so they are not independent: the unit of resampling is the image with all of its
lines. Two builds are compared on the same images, so the difficulty of an image cancels. Three methods, chosen by coverage
(docs/regress-intervals.md, `python -m bench.interval_coverage`):

- Means, ratios and roots of ratios: the symmetric bootstrap-t, on the logarithm if a measure cannot be negative. The distance
  of a resampled suite is divided by its own standard error, because without the rare large values a suite underestimates both
  the value and its error. Never narrower than Student's t.
  Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 12.5; Hall, "On Symmetric Bootstrap
  Confidence Intervals", 1988; DiCiccio and Efron, "Bootstrap Confidence Intervals", 1996, section 4.
- Shares: Wilson's score interval with the effective sample size of the clustered sample; it has a width even if nothing failed.
  A paired difference of shares: Tango's score interval.
  Source: Wilson, "Probable Inference", 1927; Kish, "Survey Sampling", 1965, section 8.2 (design effect); Tango, "Equivalence
  Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design", 1998.
- Quantiles: all values for which Wilson's test, with the design effect there, does not reject that a share q lies below.
  Source: Woodruff, "Confidence Intervals for Medians and Other Position Measures", 1952; by test inversion: Francisco and
  Fuller, "Quantile Estimation with a Complex Survey Design", 1991.

If all images have the same value, the interval of a mean has zero width: the suite says nothing about other images.
If a value is not finite, the figure and its bounds are NaN.
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
_DRAWN_AT_ONCE = 1 << 20  # counts of images; 8 MiB
_ROUNDING = 1e-12  # relative; a smaller spread counts as none
_NO_SPREAD = 1e-5  # the same for a standard error relative to ours: cancelling squares leave the root of a rounding error


class Interval(msgspec.Struct, frozen=True):
    """A value and the bounds of its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the value."""
        return Interval(function(self.value), function(self.low), function(self.high))


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def interval_of_sums(function: Callable[..., Any], *columns: np.ndarray, positive: bool = False) -> Interval:
    """Return a smooth function of the columns' sums and its interval.

    Args:
        function: of one array per column, all of one shape (sums over images); returns an array of that shape.
        columns: (images,) float each, one number per image.
        positive: the function cannot be below 0; the interval is then symmetric in the logarithm.

    Raises:
        InputError: fewer than two images. MachineError: scipy is not installed.
    """
    rows = np.stack([np.asarray(column, np.float64) for column in columns], -1)
    _require_several(len(rows))
    with np.errstate(all="ignore"):  # resampled suites without spread are removed below
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
    """Return the function's value and standard error in each resampled suite, (suites,) float64 each.

    The error is linearized: the covariance of the sums, multiplied by the function's slopes on both sides.

    Args:
        function: as for `interval_of_sums`.
        rows: (images, columns) float64.
        weights: (suites, images) float64, how often each image was drawn.
    """
    n, k = rows.shape
    centre = rows.mean(0)
    off = rows - centre  # less cancellation if all values are close together
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
    """Yield how often each image was drawn, (suites, images) float64: RESAMPLES suites, in chunks."""
    size = max(1, _DRAWN_AT_ONCE // images)
    for start in range(0, RESAMPLES, size):
        yield _drawn(images, start, min(size, RESAMPLES - start))


@functools.lru_cache(maxsize=1)  # all measures of a suite use the same chunk
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
    """Return the mean of a measure over all tokens (or lines), from sums and counts per image, (images,) float each.

    If no sum is negative, the measure is assumed to be non-negative.
    """
    counted = counts > 0  # an image without anything to average over is no part of this sample
    return interval_of_sums(np.divide, sums[counted], counts[counted], positive=bool((sums[counted] >= 0).all()))


def difference_of_means(sums: np.ndarray, other: np.ndarray, counts: np.ndarray) -> Interval:
    """Return mean(sums) - mean(other) over the same tokens, paired; arrays are (images,) float."""
    counted = counts > 0
    return interval_of_sums(lambda a, b, n: (a - b) / n, sums[counted], other[counted], counts[counted])


def ratio_of_means(sums: np.ndarray, other: np.ndarray) -> Interval:
    """Return mean(sums) / mean(other) over the same tokens, paired; arrays are (images,) float ≥ 0, sum(other) > 0."""
    return interval_of_sums(np.divide, sums, other, positive=True)


def root_ratio(num: np.ndarray, den: np.ndarray) -> Interval:
    """Return sqrt(sum(num) / sum(den)), a relative or root mean square; arrays are (images,) float, non-negative."""
    return ratio_of_means(num, den).map(math.sqrt)


def share(right: np.ndarray, counts: np.ndarray) -> Interval:
    """Return the share of correct tokens (or lines), from those of each image and their counts, (images,) float each.

    Raises:
        InputError: fewer than two images with a count.
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
    """Return the change of the share of correct lines, paired: newly correct minus newly wrong lines.

    Args:
        gained, lost: number of lines of each image that became correct and wrong, (images,) float each.
        counts: number of lines of each image, (images,) float.

    Raises:
        InputError: fewer than two images with a count. MachineError: scipy is not installed.
    """
    counted = counts > 0
    up, down, counts = (np.asarray(column, np.float64)[counted] for column in (gained, lost, counts))
    _require_several(len(counts))
    rose, fell, total = (float(column.sum()) for column in (up, down, counts))
    change = (rose - fell) / total
    if not math.isfinite(change):
        return _UNKNOWN
    effect = _design_effect(up - down, counts, (rose + fell) / total - change**2)
    return Interval(change, *_tango(rose / effect, fell / effect, total / effect))


def quantile(groups: Sequence[np.ndarray], q: float) -> Interval:
    """Return the q-quantile of all values, (tokens,) float per image, and its interval; see `quantiles`."""
    return quantiles(groups, [q])[0]


def quantiles(groups: Sequence[np.ndarray], qs: Sequence[float]) -> list[Interval]:
    """Return quantiles of all values, each with its interval.

    Args:
        groups: values of the tokens of each image, (tokens,) float each.
        qs: from 0 to 1.

    Raises:
        InputError: fewer than two images with a count.
    """
    filled = [group for group in groups if len(group)]
    _require_several(len(filled))
    values, counts = np.concatenate(filled).astype(np.float64), np.array([len(group) for group in filled])
    if not np.isfinite(values).all():
        return [_UNKNOWN] * len(qs)
    order = np.argsort(values, kind="stable")
    return [_quantile(values[order], np.repeat(np.arange(len(counts)), counts)[order], counts, q) for q in qs]


def _quantile(values: np.ndarray, image: np.ndarray, counts: np.ndarray, q: float) -> Interval:
    """Return one quantile of sorted values (tokens,); `image` (tokens,) int is that of each, `counts` (images,) int."""
    total = len(values)

    def reach(below: int) -> float:
        """Return how far the share of values below may be from q, if q is the true share: Wilson's test."""
        part = below / total
        effect = _design_effect(np.bincount(image[:below], minlength=len(counts)), counts, part * (1 - part))
        return _Z * math.sqrt(q * (1 - q) * effect / total)

    first = bisect_left(range(total - 1), True, key=lambda i: (i + 1) / total + reach(i + 1) >= q)
    after = bisect_left(range(1, total), True, key=lambda i: i / total - reach(i) > q)
    value = float(np.quantile(values, q))
    return Interval(value, min(float(values[first]), value), max(float(values[after]), value))


def _design_effect(of_images: np.ndarray, counts: np.ndarray, own: float) -> float:
    """Return the design effect: the variance of sum(of_images) / sum(counts), divided by that of independent lines.

    It is 1 if images do not differ. `own` is the variance of one line.
    """
    n, total = len(counts), counts.sum()
    off = of_images - of_images.sum() / total * counts
    variance = float((off**2).sum() * n / (n - 1) / total)
    return variance / own if own > 0 and variance > _ROUNDING**2 * total else 1.0


def _wilson(part: float, one_over_n: float) -> tuple[float, float]:
    """Return the bounds of Wilson's interval of a share of n independent lines."""
    wide = _Z**2 * one_over_n
    middle, half = part + wide / 2, math.sqrt(wide * part * (1 - part) + wide**2 / 4)
    low, high = (middle - half) / (1 + wide), (middle + half) / (1 + wide)
    return max(min(low, part), 0.0), min(max(high, part), 1.0)  # at 0 and 1, rounding could exclude the share


def _tango(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the bounds of Tango's interval of (gained - lost) / n: what a score test does not reject."""
    try:
        from scipy.optimize import brentq
    except ImportError as error:
        raise MachineError(f"intervals need {error.name}; install it with: {install_hint('regress')}") from error
    change = (gained - lost) / n

    def score(rise: float) -> float:
        b = (2 * n - gained + lost) * rise - gained - lost
        root = math.sqrt(max(b * b + 8 * n * lost * rise * (1 - rise), 0.0))
        share_lost = (root - b) / (4 * n)  # maximum likelihood estimate, given `rise`
        variance = n * (2 * share_lost + rise * (1 - rise))
        off = gained - lost - n * rise
        return off / math.sqrt(variance) if variance > 1e-12 * n else math.copysign(math.inf if off else 0.0, off)

    def end(far: float, sign: int) -> float:
        if abs(change - far) < _ROUNDING:
            return far
        return float(brentq(lambda rise: min(sign * score(rise), 2 * _Z) - _Z, far, change, xtol=1e-12))

    return end(-1.0, 1), end(1.0, -1)


def _require_several(images: int) -> None:
    if images < 2:
        raise InputError(f"an interval needs two or more images, got {images}; use a larger suite")
