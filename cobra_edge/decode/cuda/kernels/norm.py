"""Root-mean-square norm of many rows (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .elementwise import stored, stored_reference
from .launch import launch
from .tiles import sizes_for


def rms_norm_many(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Write each row over its root mean square, times the weight.

    Args:
        x: (T, d) float32; rows may be apart.
        weight: (d,) float32.
        eps: added to the mean square.
        out: (T, d) float16, saturated, or float32, contiguous.
    """
    tokens, d = x.shape
    sizes = sizes_for("rms_norm_many", x.device)
    launch(_rms_norm_rows, (tokens,), x, weight, eps, out, d=d, x_stride=x.stride(0), BLOCK=triton.next_power_of_2(d), **sizes)


def rms_norm_many_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Do what `rms_norm_many` does."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(stored_reference(x * scale * weight, out.dtype))


@triton.jit
def _rms_norm_rows(x, weight, eps, out, d: tl.constexpr, x_stride: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row, which fits its registers."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d
    values = tl.load(x + row * x_stride + i, mask=inside, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / d + eps)
    values = values * scale * tl.load(weight + i, mask=inside, other=0.0)
    tl.store(out + row * d + i, stored(values, out.dtype.element_ty), mask=inside)
