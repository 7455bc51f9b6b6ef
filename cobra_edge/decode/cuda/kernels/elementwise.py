"""What kernels do to single numbers: activations, and how a number is stored. Each reference is the formula in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

LARGEST_FLOAT16 = 65504.0


@triton.jit
def silu(x):
    """Return x · sigmoid(x) of float32; nothing overflows on the way."""
    e = tl.exp(-tl.abs(x))
    return x * tl.where(x > 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) of float32 to its last bits, however large or small.

    A GPU's own logarithm is exact to 2^-22 near 1, not relative to what is small: a step Δ of 0.001 would lose half its
    digits. log(1 + e) = 2 artanh(s) with s = e / (2 + e) ≤ 1/3, and the series' next term is below 2^-30.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 / 15.0
    series = series * q + 1.0 / 13.0
    series = series * q + 1.0 / 11.0
    series = series * q + 1.0 / 9.0
    series = series * q + 1.0 / 7.0
    series = series * q + 1.0 / 5.0
    series = series * q + 1.0 / 3.0
    return tl.where(x > 0.0, x, 0.0) + 2.0 * (s + s * q * series)


@triton.jit
def stored(x, dtype: tl.constexpr):
    """Return x of float32 as dtype; float16 takes the largest it has instead of infinity, and NaN stays NaN."""
    if dtype == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(dtype)


silu_reference = F.silu
softplus_reference = F.softplus


def stored_reference(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do what `stored` does."""
    if dtype == torch.float16:
        x = x.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16)
    return x.to(dtype)
