"""95 % confidence intervals of figures, clustered by image.

Lines about one image share its embeddings, so they are not independent: the unit of sampling is the image with all of its
lines. Two builds are compared on the same images, so the difficulty of an image cancels. Methods, chosen by coverage
(docs/regress-intervals.md, `python -m bench.interval_coverage`):

- Means, ratios and roots of ratios: Student's t, with each end moved outwards by the skewness of the images: a suite without
  the rare large values underestimates both the value and its error. Hall's transformation of t, inverted, makes up for it. If a
  measure cannot be negative, the ends are at least those of t on the logarithm. No end is farther off than some ten times the
  value: the skewness of n numbers is at most √n.
  Source: Hall, "On the Removal of Skewness by Transformation", 1992, section 2; the error is linearized.
- Shares: Wilson's score interval with the effective sample size of the clustered sample, and Student's t for the number of
  images, from which that size is estimated; it has a width even if nothing failed. A paired difference of shares: Tango's score
  interval, with the effective sample size.
  Source: Wilson, "Probable Inference", 1927; Kish, "Survey Sampling", 1965, section 8.2 (design effect); Tango, "Equivalence
  Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design", 1998.
- Quantiles: all values for which Wilson's test, with t and the design effect there, does not reject that a share q lies below.
  Source: Woodruff, "Confidence Intervals for Medians and Other Position Measures", 1952; by test inversion: Francisco and
  Fuller, "Quantile Estimation with a Complex Survey Design", 1991.

If all images have the same value, the interval of a mean has zero width: the suite says nothing about other images.
If a value is not finite, the figure and its bounds are NaN.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from statistics import NormalDist

import msgspec
import numpy as np

from ..errors import InputError

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_ROUNDING = 1e-12  # relative; a smaller spread counts as none
_HALVINGS = 64  # of an interval of length 2: below the rounding of a float64


class Interval(msgspec.Struct, frozen=True):
    """A value and the bounds of its 95 % interval, in the unit of the value."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the value."""
        return Interval(function(self.value), function(self.low), function(self.high))

    def within(self, low: float, high: float) -> Interval:
        """Return the interval without what lies beyond the bounds of the measure."""
        return Interval(self.value, max(self.low, low), min(self.high, high))


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def mean(sums: np.ndarray, counts: np.ndarray, *, positive: bool = True) -> Interval:
    """Return the mean of a measure over all tokens (or lines).

    Args:
        sums, counts: of each image, (images,) float each.
        positive: the measure cannot be negative.

    Raises:
        InputError: fewer than two images with a count.
    """
    counted = counts > 0  # an image without anything to average over is no part of this sample
    return _ratio(sums[counted], counts[counted], positive)


def difference_of_means(sums: np.ndarray, other: np.ndarray, counts: np.ndarray) -> Interval:
    """Return mean(sums) - mean(other) over the same tokens, paired; arrays are (images,) float."""
    return mean(sums - other, counts, positive=False)


def ratio_of_means(sums: np.ndarray, other: np.ndarray) -> Interval:
    """Return mean(sums) / mean(other) over the same tokens, paired; arrays are (images,) float ≥ 0, sum(other) > 0."""
    return _ratio(sums, other, True)


def root_ratio(num: np.ndarray, den: np.ndarray) -> Interval:
    """Return sqrt(sum(num) / sum(den)), a relative or root mean square; arrays are (images,) float, non-negative."""
    return ratio_of_means(num, den).map(math.sqrt)


def _ratio(over: np.ndarray, of: np.ndarray, positive: bool) -> Interval:
    """Return sum(over) / sum(of), of (images,) float each; `positive` says that it cannot be negative."""
    n = len(of)
    _require_several(n)
    total, value = float(of.sum()), float(over.sum() / of.sum())
    if not (math.isfinite(total) and math.isfinite(value)):
        return _UNKNOWN
    off = over - value * of
    squares, cubes = float((off**2).sum()), float((off**3).sum())
    error = math.sqrt(squares * n / (n - 1)) / total
    if not error > _ROUNDING * abs(value):
        return Interval(value, value, value)
    t, skew = _student(n - 1), cubes / squares**1.5
    below, above = max(t, _with_skewness(t, skew)), max(t, -_with_skewness(-t, skew))
    if not positive or value <= 0:
        return Interval(value, value - below * error, value + above * error)
    factor = math.exp(t * error / value)
    return Interval(value, value / factor, max(value * factor, value + above * error))


def _with_skewness(t: float, skew: float) -> float:
    """Return the studentized distance that Hall's transformation takes to t; `skew` is the skewness divided by √images."""
    if abs(skew) < 1e-6:
        return t
    inner = 1 + skew * (t - skew / 6)
    return 3 / skew * (math.copysign(abs(inner) ** (1 / 3), inner) - 1)


@functools.lru_cache(maxsize=64)
def _student(freedom: int) -> float:
    """Return the quantile of Student's t that 95 % of both sides lie within, for whole degrees of freedom.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.3 and 26.7.4, solved by bisection.
    """

    def inside(angle: float) -> float:
        """Return the probability of |t| < tan(angle) √freedom."""
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term, series = (cosine if odd else 1.0), 0.0
        for k in range(1 + odd, freedom, 2):
            series += term
            term *= cosine**2 * k / (k + 1)
        return (angle + sine * series) * 2 / math.pi if odd else sine * series

    angle = _edge(lambda angle: inside(angle) < CONFIDENCE, 0.0, math.pi / 2)
    return math.tan(angle) * math.sqrt(freedom)


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return how far something holds on the way from inside, where it does, to outside: bisection."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


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
    return Interval(value, *_wilson(value, effect / float(counts.sum()), _student(len(counts) - 1)))


def difference_of_shares(gained: np.ndarray, lost: np.ndarray, counts: np.ndarray) -> Interval:
    """Return the change of the share of correct lines, paired: newly correct minus newly wrong lines.

    Args:
        gained, lost: number of lines of each image that became correct and wrong, (images,) float each.
        counts: number of lines of each image, (images,) float.

    Raises:
        InputError: fewer than two images with a count.
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
    total, t = len(values), _student(len(counts) - 1)

    def reach(below: int) -> float:
        """Return how far the share of values below may be from q, if q is the true share: Wilson's test."""
        part = below / total
        effect = _design_effect(np.bincount(image[:below], minlength=len(counts)), counts, part * (1 - part))
        return t * math.sqrt(q * (1 - q) * effect / total)

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


def _wilson(part: float, one_over_n: float, z: float) -> tuple[float, float]:
    """Return the bounds of Wilson's interval of a share of n independent lines; `z` is the quantile of the test."""
    wide = z**2 * one_over_n
    middle, half = part + wide / 2, math.sqrt(wide * part * (1 - part) + wide**2 / 4)
    low, high = (middle - half) / (1 + wide), (middle + half) / (1 + wide)
    return max(min(low, part), 0.0), min(max(high, part), 1.0)  # at 0 and 1, rounding could exclude the share


def _tango(gained: float, lost: float, n: float) -> tuple[float, float]:
    """Return the bounds of Tango's interval of (gained - lost) / n: what a score test does not reject."""
    change = (gained - lost) / n

    def accepted(rise: float) -> bool:
        b = (2 * n - gained + lost) * rise - gained - lost
        root = math.sqrt(max(b * b + 8 * n * lost * rise * (1 - rise), 0.0))
        share_lost = (root - b) / (4 * n)  # maximum likelihood estimate, given `rise`
        variance = n * (2 * share_lost + rise * (1 - rise))
        return (gained - lost - n * rise) ** 2 <= _Z**2 * max(variance, 0.0)

    return _edge(accepted, change, -1.0), _edge(accepted, change, 1.0)


def _require_several(images: int) -> None:
    if images < 2:
        raise InputError(f"an interval needs two or more images, got {images}; use a larger suite")
