"""GPTQ: round a matrix column by column; the columns not yet rounded compensate for each column's error.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", section 3,
algorithm 1. Columns are processed by descending mean square of their inputs (its "act-order"); scales are fixed beforehand, so
groups stay contiguous in any order. Damping grows until the factorization succeeds.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from ..errors import InputError
from ..formats.packing import QuantizedTensor, pack
from ..formats.scheme import Scheme
from .descent import damped, descend
from .rtn import require_fit
from .scales import least_error_scales

log = logging.getLogger(__name__)

DAMPING = 0.01  # share of the mean diagonal that is added to the diagonal; ten times more after each failure
_MOST_DAMPING = 1e4
_COLUMNS_AT_ONCE = 64  # block of columns whose errors update the later columns in one matmul


def gptq(
    weight: np.ndarray, second_moments: np.ndarray, scheme: Scheme, damping: float = DAMPING, sweeps: int = 0
) -> QuantizedTensor:
    """Quantize a matrix W with a small error of W x on the calibration inputs: Σ tr(ΔW H ΔWᵀ), H their second moment.

    Args:
        weight: (out, in) float32, finite.
        second_moments: (in, in) float32, symmetric, or (groups, in, in) for groups of consecutive rows; inputs that are
            always 0 may have zeros.
        scheme: with groups and integer codes.
        damping: share of the mean diagonal that is added to the diagonal.
        sweeps: of coordinate descent over all codes afterwards (`descent`).

    Raises:
        InputError: the group size does not divide in, values are not finite, or no damping makes the second moment positive
            definite.
    """
    require_fit(weight, scheme)
    scales = least_error_scales(weight, scheme)
    steps = np.repeat(scales.astype(np.float32), scheme.group(weight.shape[1]), axis=1)
    moments = second_moments if second_moments.ndim == 3 else second_moments[None]
    unsigned = np.empty(weight.shape, np.uint8)
    for rows, moment in zip(np.array_split(np.arange(len(weight)), len(moments)), moments, strict=True):
        order = np.argsort(-np.diagonal(moment), kind="stable")
        ordered = moment[np.ix_(order, order)]
        factor = inverse_factor(ordered, damping)
        columns, step = (torch.from_numpy(np.ascontiguousarray(a[rows][:, order].T)) for a in (weight, steps))
        codes = _round_columns(columns.clone(), step, factor, scheme.zero_code)
        if sweeps:
            descend(codes, columns, step, damped(torch.from_numpy(ordered), damping), scheme.zero_code, sweeps)
        found = np.empty((len(rows), len(order)), np.uint8)
        found[:, order] = (codes.T + scheme.zero_code).to(torch.uint8).numpy()
        unsigned[rows] = found
    return QuantizedTensor(pack(unsigned, scheme), scales, scheme)


def inverse_factor(second_moment: np.ndarray, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped second moment (in, in), (in, in) float32.

    Args:
        second_moment: (in, in), symmetric.
        damping: share of the mean diagonal to start with.

    Raises:
        InputError: not finite, or not positive definite with any damping.
    """
    hessian = torch.from_numpy(np.array(second_moment, np.float64))
    if not torch.isfinite(hessian).all():
        raise InputError("a second moment holds NaN or infinity; calibrate again")
    mean = float(hessian.diagonal().mean()) or 1.0
    while damping <= _MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
        log.info("second moment is not positive definite with damping %g; retrying with ten times more", damping)
        damping *= 10
    raise InputError("a second moment is not positive definite with any damping; calibrate again with more lines")


def _round_columns(columns: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, zero: int) -> torch.Tensor:
    """Return signed codes (in, out) for transposed weights `columns` (in, out), which are overwritten."""
    n_in, codes = len(columns), torch.empty_like(columns)
    for start in range(0, n_in, _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, n_in)
        errors = torch.empty_like(columns[start:end])
        for j in range(start, end):
            code = torch.where(steps[j] == 0, 0.0, columns[j] / steps[j]).round_().clamp_(-zero, zero - 1)
            codes[j] = code
            error = torch.sub(columns[j], code * steps[j], out=errors[j - start]).div_(factor[j, j])
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes
