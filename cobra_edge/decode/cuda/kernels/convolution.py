"""Causal depthwise convolution, bias and SiLU over many tokens, with a carried state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .elementwise import silu, stored, stored_reference
from .launch import launch
from .tiles import sizes_for


def convolve_many(x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """Convolve each channel with its last d_conv inputs, add the bias, apply SiLU; the state moves on in place.

    Args:
        x: (T, d_inner) float16 or float32; rows may be apart.
        state: (d_inner, d_conv) float32, the inputs before x, newest last.
        weight: (d_inner, d_conv) float32, the tap of the newest input last.
        bias: (d_inner,) float32.
        out: (T, d_inner) float16, saturated, or float32, contiguous.

    Source: Gu and Dao 2023, section 3.4, figure 3.
    """
    tokens, d_inner = x.shape
    d_conv = weight.shape[1]
    sizes = sizes_for("convolve_many", x.device)
    assert sizes["BLOCK_T"] >= d_conv, "only a program of the first tokens may meet the old state"
    grid = (triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(d_inner, sizes["BLOCK_C"]))
    strides = {"x_stride": x.stride(0)}
    launch(_convolve, grid, x, state, weight, bias, out, tokens, d_inner=d_inner, d_conv=d_conv, **strides, **sizes)


def convolve_many_reference(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor
) -> None:
    """Do what `convolve_many` does."""
    d_conv = weight.shape[1]
    window = torch.cat([state.T, x.float()])
    sums = sum(window[k + 1 : k + 1 + len(x)] * weight[:, k] for k in range(d_conv))
    out.copy_(stored_reference(F.silu(sums + bias), out.dtype))
    state.copy_(window[-d_conv:].T)


@triton.jit(do_not_specialize=["tokens"])
def _convolve(
    x,
    state,
    weight,
    bias,
    out,
    tokens,
    d_inner: tl.constexpr,
    d_conv: tl.constexpr,
    x_stride: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a block of tokens and channels; one program alone meets the old state of a channel, and writes the new."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c < d_inner
    inside = (t < tokens)[:, None] & channel[None, :]
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + tl.load(bias + c, mask=channel, other=0.0)[None, :]
    for k in tl.static_range(d_conv):
        seen = t + (k + 1 - d_conv)
        old = tl.load(state + c[None, :] * d_conv + (seen + d_conv)[:, None], mask=inside & (seen < 0)[:, None], other=0.0)
        new = tl.load(x + seen[:, None] * x_stride + c[None, :], mask=inside & (seen >= 0)[:, None], other=0.0)
        sums += (old + new.to(tl.float32)) * tl.load(weight + c * d_conv + k, mask=channel, other=0.0)[None, :]
    tl.store(out + t[:, None] * d_inner + c[None, :], stored(silu(sums), out.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        for k in tl.static_range(d_conv):
            # With fewer tokens than taps an old input moves to a lower place, which nothing reads any more.
            last = tl.full((BLOCK_C,), k - d_conv, tl.int64) + tokens
            kept = tl.load(state + c * d_conv + last + d_conv, mask=channel & (last < 0), other=0.0)
            came = tl.load(x + last * x_stride + c, mask=channel & (last >= 0), other=0.0)
            tl.debug_barrier()  # every thread has read what is now written over
            tl.store(state + c * d_conv + k, kept + came.to(tl.float32), mask=channel)
