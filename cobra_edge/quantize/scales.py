"""Scales of groups of weights.

The largest weight determines the plain scale. A search around it finds the scale with the least error, in which large weights
count more: an unweighted error clips the large ones, and clipped weights all err in the same direction, which hurts a model far
more than the squared error shows (measured in docs/log.md).
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import InputError
from ..formats.scheme import Scheme

_ROWS_AT_ONCE = 1 << 20  # weights processed together: temporaries stay in the cache
# Candidates relative to the plain scale. Below 1 the extreme weight is clipped, above 1 it is rounded like the others.
_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 1.05)
_FLOOR = 0.3  # a weight of 0 counts as much as one whose square is this share of the group's mean square


def largest_value_scales(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return the scales that put the weight of largest magnitude in each group exactly on the lowest code.

    The scale takes the opposite sign of that weight, so that all 2^bits codes are used.

    Args:
        weight: (out, in) float32, finite.
        scheme: with groups that divide in.

    Returns:
        (out, in / group) float16.

    Raises:
        InputError: values that are not finite or whose scale overflows float16.
    """
    groups = weight.reshape(len(weight), -1, scheme.group(weight.shape[1]))
    low, high = groups.min(axis=2), groups.max(axis=2)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (np.where(-low > high, low, high) / -scheme.zero_code).astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputError("a weight is not finite or too large for a float16 scale; fix the checkpoint")
    return scales


def least_error_scales(weight: np.ndarray, scheme: Scheme, importance: np.ndarray | None = None) -> np.ndarray:
    """Return the scales, of either sign, that round each group with the least weighted squared error.

    The error at weight w of input j counts importance_j · (0.3 · mean(w²) + w²), the mean over its group.

    Args:
        weight: (out, in) float32, finite.
        scheme: with groups that divide in.
        importance: (in,) float32, mean squares of the inputs; None weights all inputs equally.

    Returns:
        (out, in / group) float16.

    Raises:
        InputError: values that are not finite or whose scale overflows float16.
    """
    out, n_in = weight.shape
    group = scheme.group(n_in)
    plain, best = largest_value_scales(weight, scheme), np.empty((out, n_in // group), np.float16)
    weighting = torch.ones(n_in) if importance is None else torch.from_numpy(np.array(importance, np.float32))
    step = max(1, _ROWS_AT_ONCE // n_in)
    for start in range(0, out, step):
        rows = torch.from_numpy(np.array(weight[start : start + step], np.float32)).reshape(-1, n_in // group, group)
        around = torch.from_numpy(plain[start : start + step].astype(np.float32))
        best[start : start + step] = _search(rows, around, weighting.reshape(-1, group), scheme.zero_code).numpy()
    return best


def _search(rows: torch.Tensor, plain: torch.Tensor, importance: torch.Tensor, zero: int) -> torch.Tensor:
    """Return float16 scales (rows, groups) for rows (rows, groups, group)."""
    squares = rows * rows
    counts = (squares + _FLOOR * squares.mean(-1, keepdim=True)) * importance
    best, least = plain.half(), torch.full_like(plain, torch.inf)
    for factor in (sign * f for f in _FACTORS for sign in (1.0, -1.0)):
        scale = (plain * factor).half()
        wide = scale.float()[..., None]
        codes = torch.where(wide == 0, 0.0, rows / wide).round_().clamp_(-zero, zero - 1)
        error = ((codes * wide).sub_(rows).square_().mul_(counts)).sum(-1)
        better = error < least  # never so with a scale beyond float16, whose error is not a number
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
