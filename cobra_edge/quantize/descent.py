"""Coordinate descent over the codes of a matrix: each code in turn takes the value that is best given all the others.

GPTQ decides each column once, knowing only the columns before it. A sweep afterwards revisits every column with the errors of
all others known; it never increases tr(ΔW H ΔWᵀ). Source: the greedy passes after the rounding of QuIP (Chee et al. 2023);
blocks of columns as in GPTQ are only a matter of speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 64


def damp(second_moment: Tensor, damping: float) -> Tensor:
    """Add a share of its mean diagonal to the diagonal of a second moment (in, in), float32 or float64, in place; return it."""
    diagonal = second_moment.diagonal()
    diagonal += damping * diagonal.mean().clamp_min(torch.finfo(second_moment.dtype).tiny)
    return second_moment


def descend(codes: Tensor, columns: Tensor, steps: Tensor, second_moment: Tensor, zero: int, sweeps: int) -> None:
    """Improve codes in place.

    Args:
        codes: (in, out) float32, signed.
        columns: (in, out) float32, the transposed weight.
        steps: (in, out) float32, the scale of each weight.
        second_moment: (in, in) float32, symmetric, damped, with a positive diagonal.
        zero: the zero point; codes are in [-zero, zero - 1].
        sweeps: over all columns.
    """
    pull = second_moment @ (codes * steps - columns)  # half the objective's gradient
    for _ in range(sweeps):
        for start in range(0, len(codes), _COLUMNS_AT_ONCE):
            block = slice(start, min(start + _COLUMNS_AT_ONCE, len(codes)))
            own, local, changes = second_moment[block, block], pull[block].clone(), torch.empty_like(pull[block])
            for i in range(len(local)):
                j = start + i
                wanted = codes[j] - torch.where(steps[j] == 0, 0.0, local[i] / (own[i, i] * steps[j]))
                code = wanted.round_().clamp_(-zero, zero - 1)
                torch.sub(code, codes[j], out=changes[i]).mul_(steps[j])
                codes[j] = code
                local.addr_(own[:, i], changes[i])
            pull.addmm_(second_moment[:, block], changes)
