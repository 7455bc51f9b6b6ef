"""The selective scan over many tokens, cut into chunks that run at the same time.

A chunk's last state is linear in its first: h = exp(A · ΣΔ) · h + what the chunk adds from zero. So one launch runs all chunks
but the last from zero (the first from the state that came in) and keeps their last states and sums of Δ; the second launch lets
each chunk carry the state over those before it, and runs the chunk again for its outputs.

Most of the time goes into one exponential for each token, channel and state, twice: exp2, one instruction where A is multiplied
by log2 e beforehand. A multiprocessor does 16 a cycle, so 768 tokens · 5120 channels · (16 + 4 and 16 + 2, with softplus and
SiLU) take 40 µs on 132 of them at 1.75 GHz. All instructions together, 275 for a token and channel as compiled for 9.0, take 36
at 128 a cycle, at the same time.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .elementwise import silu, softplus, stored, stored_reference
from .launch import launch
from .tiles import sizes_for


def scan_many(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    h: torch.Tensor,
    out: torch.Tensor,
    *,
    fresh: bool = False,
) -> None:
    """Run h = exp(Δ·A)·h + Δ·B·u, out = (C·h + D·u)·silu(z) with Δ = softplus(dt + dt_bias), token after token, in float32.

    Args:
        u, z: (T, d_inner) float16 or float32; rows may be apart.
        dt: (T, d_inner) float32; rows may be apart.
        A: (d_inner, d_state) float32, negative.
        B, C: (T, d_state) float32; rows may be apart.
        D, dt_bias: (d_inner,) float32.
        h: (d_inner, d_state) float32, changed in place.
        out: (T, d_inner) float16, saturated, or float32, contiguous.
        fresh: h is known to be all zeros; an implementation may make use of it, this one need not.

    Source: Gu and Dao 2023, equation 2a and algorithm 2.
    """
    tokens, d_inner = u.shape
    d_state = A.shape[1]
    sizes = dict(sizes_for("scan_many", u.device))
    blocks = triton.cdiv(d_inner, sizes["BLOCK_C"])
    length = sizes.pop("CHUNK") if blocks < _enough_programs(u.device) else tokens
    chunks = triton.cdiv(tokens, length)
    shape = {"d_inner": d_inner, "d_state": d_state, "STATES": triton.next_power_of_2(d_state)}
    strides = {"u_stride": u.stride(0), "dt_stride": dt.stride(0), "b_stride": B.stride(0)}
    strides |= {"a_stride_c": A.stride(0), "a_stride_n": A.stride(1)}
    starts, sums = h, dt_bias  # not read where a chunk is alone
    if chunks > 1:
        starts = torch.empty((chunks, d_state, d_inner), dtype=torch.float32, device=u.device)
        sums = torch.empty((chunks, d_inner), dtype=torch.float32, device=u.device)
        first = (u, dt, A, B, dt_bias, h, starts, sums)
        launch(_scan_from_zero, (blocks, chunks - 1), *first, length, **shape, **strides, **sizes)
    strides |= {"c_stride": C.stride(0), "z_stride": z.stride(0)}
    inputs = (u, dt, A, B, C, D, z, dt_bias, starts, sums, h, out)
    launch(_scan_chunk, (blocks, chunks), *inputs, tokens, length, CHUNKED=chunks > 1, **shape, **strides, **sizes)


def scan_many_reference(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    h: torch.Tensor,
    out: torch.Tensor,
    *,
    fresh: bool = False,
) -> None:
    """Do what `scan_many` does."""
    delta, values = F.softplus(dt + dt_bias), u.float()
    for t in range(len(u)):
        h.copy_(torch.exp(delta[t, :, None] * A) * h + (delta[t] * values[t])[:, None] * B[t])
        y = (h @ C[t] + D * values[t]) * F.silu(z[t].float())
        out[t] = stored_reference(y, out.dtype)


@cache
def _enough_programs(device: torch.device) -> int:
    """Return how many programs of one warp keep a GPU's exponential units busy: one for each of a multiprocessor's four.

    With so many blocks of channels, as on a small GPU, chunks would only do work twice.
    """
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1 << 30


# In both kernels a thread owns two channels with all their states: tiles are (states, channels), channels lie next to each
# other in a warp. A sum over states needs no other thread, and what is needed once a channel is computed by one thread.
# Triton lays a tile out as its loads like it best: so what lies by channel is read a state at a time, and of scratch, which
# lies by state, no more than two channels are said to be next to each other.


@triton.jit
def _by_state(rows, stride, channel, d_state: tl.constexpr, STATES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a tile (STATES, BLOCK_C) of what lies by channel; rows are pointers to each channel's first state."""
    n = tl.arange(0, STATES)[:, None]
    tile = tl.zeros((STATES, BLOCK_C), tl.float32)
    for k in tl.static_range(d_state):
        tile = tl.where(n == k, tl.load(rows + k * stride, mask=channel, other=0.0)[None, :], tile)
    return tile


@triton.jit
def _store_by_channel(rows, tile, channel, d_state: tl.constexpr, STATES: tl.constexpr):
    """Write a tile (STATES, BLOCK_C) to where it lies by channel."""
    n = tl.arange(0, STATES)[:, None]
    for k in tl.static_range(d_state):
        tl.store(rows + k, tl.sum(tl.where(n == k, tile, 0.0), axis=0), mask=channel)


@triton.jit(do_not_specialize=["length"])
def _scan_from_zero(
    u,
    dt,
    A,
    B,
    dt_bias,
    h,
    starts,
    sums,
    length,
    d_inner: tl.constexpr,
    d_state: tl.constexpr,
    STATES: tl.constexpr,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    a_stride_c: tl.constexpr,
    a_stride_n: tl.constexpr,
    b_stride: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Run one full chunk of a block of channels; starts[chunk + 1] is its last state, sums[chunk] its ΣΔ; starts[0] is h."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, STATES)
    chunk = tl.program_id(1).to(tl.int64)
    channel = c < d_inner
    inside = (n < d_state)[:, None] & channel[None, :]
    slot = tl.max_contiguous(n[:, None] * d_inner + c[None, :], [1, 2])
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    rate = _by_state(A + c * a_stride_c, a_stride_n, channel, d_state, STATES, BLOCK_C) * 1.4426950408889634
    state = tl.zeros((STATES, BLOCK_C), tl.float32)
    if chunk == 0:
        state = _by_state(h + c * d_state, 1, channel, d_state, STATES, BLOCK_C)
        tl.store(starts + slot, state, mask=inside)
    total = tl.zeros((BLOCK_C,), tl.float32)
    u += chunk * length * u_stride + c
    dt += chunk * length * dt_stride + c
    B += chunk * length * b_stride + n
    raw, value = tl.load(dt, mask=channel, other=0.0), tl.load(u, mask=channel, other=0.0)
    for step in range(length):
        # The next token's numbers are on their way while this one's are used; the last token's are loaded twice.
        more = step + 1 < length
        u += tl.where(more, u_stride, 0)
        dt += tl.where(more, dt_stride, 0)
        next_raw, next_value = tl.load(dt, mask=channel, other=0.0), tl.load(u, mask=channel, other=0.0)
        delta = softplus(raw + bias)
        added = delta * value.to(tl.float32)
        into = tl.load(B, mask=n < d_state, other=0.0)
        state = tl.exp2(delta[None, :] * rate) * state + added[None, :] * into[:, None]
        total += delta
        B += b_stride
        raw, value = next_raw, next_value
    tl.store(starts + (chunk + 1) * d_inner * d_state + slot, state, mask=inside)
    tl.store(sums + chunk * d_inner + c, total, mask=channel)


@triton.jit(do_not_specialize=["tokens", "length"])
def _scan_chunk(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    starts,
    sums,
    h,
    out,
    tokens,
    length,
    d_inner: tl.constexpr,
    d_state: tl.constexpr,
    STATES: tl.constexpr,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    a_stride_c: tl.constexpr,
    a_stride_n: tl.constexpr,
    b_stride: tl.constexpr,
    c_stride: tl.constexpr,
    z_stride: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Carry the state over the chunks before, then run this one and write its outputs; the last chunk writes h.

    Nobody reads h here but a chunk that is alone: starts[0] is the copy that the first launch made.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, STATES)
    chunk = tl.program_id(1).to(tl.int64)
    channel = c < d_inner
    inside = (n < d_state)[:, None] & channel[None, :]
    slot = tl.max_contiguous(n[:, None] * d_inner + c[None, :], [1, 2])
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    skip = tl.load(D + c, mask=channel, other=0.0)
    rate = _by_state(A + c * a_stride_c, a_stride_n, channel, d_state, STATES, BLOCK_C) * 1.4426950408889634
    if CHUNKED:
        state = tl.load(starts + tl.minimum(chunk, 1) * d_inner * d_state + slot, mask=inside, other=0.0)
    else:
        state = _by_state(h + c * d_state, 1, channel, d_state, STATES, BLOCK_C)
    for before in range(1, chunk):
        total = tl.load(sums + before * d_inner + c, mask=channel, other=0.0)
        local = tl.load(starts + (before + 1) * d_inner * d_state + slot, mask=inside, other=0.0)
        state = tl.exp2(total[None, :] * rate) * state + local
    tl.debug_barrier()  # a chunk that is alone has read h
    u += chunk * length * u_stride + c
    dt += chunk * length * dt_stride + c
    z += chunk * length * z_stride + c
    B += chunk * length * b_stride + n
    C += chunk * length * c_stride + n
    out += chunk * length * d_inner + c
    steps = tl.minimum(tokens - chunk * length, length)
    raw, value, gate = (
        tl.load(dt, mask=channel, other=0.0),
        tl.load(u, mask=channel, other=0.0),
        tl.load(z, mask=channel, other=0.0),
    )
    for step in range(steps):
        more = step + 1 < steps
        dt += tl.where(more, dt_stride, 0)
        u += tl.where(more, u_stride, 0)
        z += tl.where(more, z_stride, 0)
        next_raw, next_value = tl.load(dt, mask=channel, other=0.0), tl.load(u, mask=channel, other=0.0)
        next_gate = tl.load(z, mask=channel, other=0.0)
        delta, current = softplus(raw + bias), value.to(tl.float32)
        into, outof = tl.load(B, mask=n < d_state, other=0.0), tl.load(C, mask=n < d_state, other=0.0)
        state = tl.exp2(delta[None, :] * rate) * state + (delta * current)[None, :] * into[:, None]
        y = (tl.sum(state * outof[:, None], axis=0) + skip * current) * silu(gate.to(tl.float32))
        tl.store(out, stored(y, out.dtype.element_ty), mask=channel)
        B += b_stride
        C += c_stride
        out += d_inner
        raw, value, gate = next_raw, next_value, next_gate
    if (chunk + 1) * length >= tokens:
        _store_by_channel(h + c * d_state, state, channel, d_state, STATES)
