"""One token's recurrence: the end of x_proj, dt_proj, softplus, the state's step and the gate, in one launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .elementwise import silu, softplus
from .launch import launch
from .tiles import sizes_for


def recur_and_gate(
    partials: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    xz: torch.Tensor,
    u: torch.Tensor,
    state: torch.Tensor,
    layer: int,
    y: torch.Tensor,
) -> None:
    """Write y = (C·h + D·u)·silu(z) after h = exp(Δ·A)·h + Δ·B·u, with Δ = softplus(dt_weight · low + dt_bias).

    Args:
        partials: (n_slices, dt_rank + 2·d_state) float32; their sum is low (dt_rank), B and C (d_state).
        dt_weight: (d_inner, dt_rank) float16.
        dt_bias, D: (d_inner,) float32.
        A: (d_inner, d_state) float32, negative.
        xz: (2·d_inner,) float32, whose right half is z.
        u: (d_inner,) float32.
        state: (1,) int64, the address of all layers' states (n_layer, d_inner, d_state) float32; this layer's is changed.
        layer: which one.
        y: (d_inner,) float32.

    Source: Gu and Dao 2023, equation 2a and algorithm 2.
    """
    d_inner, dt_rank = dt_weight.shape
    d_state = A.shape[1]
    sizes = sizes_for("recur_and_gate", u.device)
    shape = {"n_slices": len(partials), "d_inner": d_inner, "dt_rank": dt_rank, "d_state": d_state}
    padded = {"RANKS": triton.next_power_of_2(dt_rank), "STATES": triton.next_power_of_2(d_state)}
    grid = (triton.cdiv(d_inner, sizes["BLOCK_C"]),)
    launch(_recur, grid, partials, dt_weight, dt_bias, A, D, xz, u, state, layer, y, **shape, **padded, **sizes)


def recur_and_gate_reference(
    partials: torch.Tensor,
    dt_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    xz: torch.Tensor,
    u: torch.Tensor,
    state: torch.Tensor,
    layer: int,
    y: torch.Tensor,
) -> None:
    """Do what `recur_and_gate` does, with the state (n_layer, d_inner, d_state) itself instead of its address."""
    low, B, C = partials.sum(0).split([dt_weight.shape[1], A.shape[1], A.shape[1]])
    delta = F.softplus(dt_weight.float() @ low + dt_bias)
    h = state[layer]
    h.copy_(torch.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B)
    y.copy_((h @ C + D * u) * F.silu(xz[len(u) :]))


@triton.jit(do_not_specialize=["layer"])
def _recur(
    partials,
    dt_weight,
    dt_bias,
    A,
    D,
    xz,
    u,
    state,
    layer,
    y,
    n_slices: tl.constexpr,
    d_inner: tl.constexpr,
    dt_rank: tl.constexpr,
    d_state: tl.constexpr,
    RANKS: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program a block of channels. What the sums are not needed for is loaded first, to be under way meanwhile."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, RANKS)
    n = tl.arange(0, STATES)
    channel, rank, some_state = c < d_inner, r < dt_rank, n < d_state
    inside = channel[:, None] & some_state[None, :]
    cell = c[:, None] * d_state + n[None, :]
    address = tl.multiple_of(tl.load(state).to(tl.pointer_type(tl.float32)), 16)
    address += tl.cast(layer, tl.int64) * (d_inner * d_state)
    h = tl.load(address + cell, mask=inside, other=0.0)
    weight = tl.load(dt_weight + c[:, None] * dt_rank + r[None, :], mask=channel[:, None] & rank[None, :], other=0.0)
    rate = tl.load(A + cell, mask=inside, other=0.0)
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    skip = tl.load(D + c, mask=channel, other=0.0)
    value = tl.load(u + c, mask=channel, other=0.0)
    gate = silu(tl.load(xz + d_inner + c, mask=channel, other=0.0))
    width: tl.constexpr = dt_rank + 2 * d_state
    low = tl.zeros((RANKS,), tl.float32)
    into = tl.zeros((STATES,), tl.float32)
    outof = tl.zeros((STATES,), tl.float32)
    for part in range(n_slices):
        row = partials + part * width
        low += tl.load(row + r, mask=rank, other=0.0)
        into += tl.load(row + dt_rank + n, mask=some_state, other=0.0)
        outof += tl.load(row + dt_rank + d_state + n, mask=some_state, other=0.0)
    delta = softplus(tl.sum(weight.to(tl.float32) * low[None, :], axis=1) + bias)
    h = tl.exp(delta[:, None] * rate) * h + (delta * value)[:, None] * into[None, :]
    tl.debug_barrier()  # where a tile is smaller than the program, several threads have read the same cell
    tl.store(address + cell, h, mask=inside)
    tl.store(y + c, (tl.sum(h * outof[None, :], axis=1) + skip * value) * gate, mask=channel)
