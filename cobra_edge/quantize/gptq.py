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
from .descent import damp, descend
from .rtn import require_fit
from .scales import least_error_scales

log = logging.getLogger(__name__)

DAMPING = 0.01  # share of the mean diagonal that is added to the diagonal; ten times more after each failure
# Of the embedding: its rows are also read one by one, where no column makes up for another.
EMBEDDING_DAMPING = 0.03
_MOST_DAMPING = 1e4
_COLUMNS_AT_ONCE = 64  # block of columns whose errors update the later columns in one matmul


def gptq(
    weight: np.ndarray,
    second_moments: np.ndarray,
    scheme: Scheme,
    damping: float = DAMPING,
    sweeps: int = 0,
    shifts: np.ndarray | None = None,
) -> QuantizedTensor:
    """Quantize a matrix W with a small error of W x on the calibration inputs: Σ tr(ΔW H ΔWᵀ), H their second moment.

    Args:
        weight: (out, in) float32, finite.
        second_moments: (in, in) float32, symmetric, or (groups, in, in) for groups of consecutive rows; inputs that are
            always 0 may have zeros.
        scheme: with groups and integer codes.
        damping: share of the mean diagonal that is added to the diagonal.
        sweeps: of coordinate descent over all codes afterwards (`descent`).
        shifts: (out, in) float32, Σ e xᵀ for errors e of W x that the codes make up for: they approximate W + shifts H⁻¹, whose
            outputs are closest to W x + e (GPTAQ, Li et al. 2025).

    Raises:
        InputError: the group size does not divide in, values are not finite, or no damping makes the second moment positive
            definite.
    """
    require_fit(weight, scheme)
    moments = second_moments if second_moments.ndim == 3 else second_moments[None]
    all_codes, all_scales = [], []
    for rows, moment in zip(np.array_split(np.arange(len(weight)), len(moments)), moments, strict=True):
        codes, scales = _quantized_rows(weight[rows], moment, scheme, damping, sweeps, None if shifts is None else shifts[rows])
        all_codes.append(codes)
        all_scales.append(scales)
    return QuantizedTensor(pack(np.concatenate(all_codes), scheme), np.concatenate(all_scales), scheme)


def _quantized_rows(
    weight: np.ndarray, moment: np.ndarray, scheme: Scheme, damping: float, sweeps: int, shifts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes (out, in) uint8 and scales (out, in / group) float16 of rows that share a second moment (in, in)."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    ordered = moment[np.ix_(order, order)]
    factor = inverse_factor(ordered, damping)
    if shifts is not None:
        moved = torch.from_numpy(np.ascontiguousarray(shifts[:, order])) @ factor.T @ factor
        weight = weight.copy()
        weight[:, order] += moved.numpy()
    scales = least_error_scales(weight, scheme)
    steps = np.repeat(scales.astype(np.float32), scheme.group(weight.shape[1]), axis=1)
    columns, step = (torch.from_numpy(np.ascontiguousarray(a[:, order].T)) for a in (weight, steps))
    codes = _round_columns(columns.clone(), step, factor, scheme.zero_code)
    if sweeps:
        descend(codes, columns, step, damp(torch.from_numpy(ordered), damping), scheme.zero_code, sweeps)
    found = np.empty(weight.shape, np.uint8)
    found[:, order] = (codes.T + scheme.zero_code).to(torch.uint8).numpy()
    return found, scales


def inverse_factor(second_moment: np.ndarray, damping: float = DAMPING) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of the damped second moment (in, in), (in, in) float32.

    In reversed order the Cholesky factorization is H = U Uᵀ with U upper: then H⁻¹ = U⁻ᵀ U⁻¹, and U⁻¹ is the factor. The
    condition number of U is the root of H's, so float32 is enough to invert it.

    Args:
        second_moment: (in, in), symmetric.
        damping: share of the mean diagonal to start with.

    Raises:
        InputError: not finite, or not positive definite with any damping.
    """
    hessian = torch.from_numpy(second_moment).flip(0, 1).double()
    if not torch.isfinite(hessian).all():
        raise InputError("a second moment holds NaN or infinity; calibrate again")
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    while damping <= _MOST_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper = lower.float().flip(0, 1)
            return torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
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
