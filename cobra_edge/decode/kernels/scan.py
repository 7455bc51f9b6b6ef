"""The selective scan over many tokens, cut into chunks that run at the same time.

A chunk's last state is linear in its first: h = exp(A · ΣΔ) · h + what the chunk adds from zero. So one launch runs all chunks
but the last from zero (the first from the state that came in) and keeps their last states and sums of Δ; the second launch lets
each chunk carry the state over those before it, and runs the chunk again for its outputs.

Most of the time goes into one exponential for each token, channel and state, twice: exp2, one instruction where A is multiplied
by log2 e beforehand. A multiprocessor does 16 a cycle, so 768 tokens · 5120 channels · (16 + 4 and 16 + 2, with softplus and
SiLU) take 40 µs on 132 of them at 1.75 GHz; the other instructions, about 230 for a token and channel at 128 a cycle, take 30
at the same time.
"""

from __future__ import annotations

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
    chunk = sizes.pop("CHUNK")
    chunks, blocks = triton.cdiv(tokens, chunk), triton.cdiv(d_inner, sizes["BLOCK_C"])
    shape = {"d_inner": d_inner, "d_state": d_state, "STATES": triton.next_power_of_2(d_state)}
    strides = {"u_stride": u.stride(0), "dt_stride": dt.stride(0), "b_stride": B.stride(0)}
    strides |= {"a_stride_c": A.stride(0), "a_stride_n": A.stride(1)}
    starts, sums = h, dt_bias  # not read where a chunk is alone
    if chunks > 1:
        starts = torch.empty((chunks, d_state, d_inner), dtype=torch.float32, device=u.device)
        sums = torch.empty((chunks, d_inner), dtype=torch.float32, device=u.device)
        first = (u, dt, A, B, dt_bias, h, starts, sums)
        launch(_scan_from_zero, (blocks, chunks - 1), *first, CHUNK=chunk, **shape, **strides, **sizes)
    strides |= {"c_stride": C.stride(0), "z_stride": z.stride(0)}
    inputs = (u, dt, A, B, C, D, z, dt_bias, starts, sums, h, out)
    launch(_scan_chunk, (blocks, chunks), *inputs, tokens, CHUNKED=chunks > 1, CHUNK=chunk, **shape, **strides, **sizes)


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


# In both kernels a thread owns two channels with all their states: tiles are (states, channels), channels lie next to each
# other in a warp. A sum over states needs no other thread, and what is needed once a channel is computed by one thread.
# Triton lays tiles out as their loads like it best; `max_contiguous` keeps it from vectors along the states.


@triton.jit
def _scan_from_zero(
    u,
    dt,
    A,
    B,
    dt_bias,
    h,
    starts,
    sums,
    d_inner: tl.constexpr,
    d_state: tl.constexpr,
    STATES: tl.constexpr,
    u_stride: tl.constexpr,
    dt_stride: tl.constexpr,
    a_stride_c: tl.constexpr,
    a_stride_n: tl.constexpr,
    b_stride: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Run one full chunk of a block of channels; starts[chunk + 1] is its last state, sums[chunk] its ΣΔ; starts[0] is h."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, STATES)
    chunk = tl.program_id(1).to(tl.int64)
    channel = c < d_inner
    inside = (n < d_state)[:, None] & channel[None, :]
    cell = tl.max_contiguous(c[None, :] * d_state + n[:, None], [1, 1])
    slot = tl.max_contiguous(n[:, None] * d_inner + c[None, :], [1, 2])
    rates = tl.max_contiguous(c[None, :] * a_stride_c + n[:, None] * a_stride_n, [1, 1])
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    rate = tl.load(A + rates, mask=inside, other=0.0) * 1.4426950408889634
    state = tl.zeros((STATES, BLOCK_C), tl.float32)
    if chunk == 0:
        state = tl.load(h + cell, mask=inside, other=0.0)
        tl.store(starts + slot, state, mask=inside)
    total = tl.zeros((BLOCK_C,), tl.float32)
    u += chunk * CHUNK * u_stride + c
    dt += chunk * CHUNK * dt_stride + c
    B += chunk * CHUNK * b_stride + n
    raw, value = tl.load(dt, mask=channel, other=0.0), tl.load(u, mask=channel, other=0.0)
    for step in range(CHUNK):
        # The next token's numbers are on their way while this one's are used; the last token's are loaded twice.
        more = step + 1 < CHUNK
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


@triton.jit(do_not_specialize=["tokens"])
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
    CHUNK: tl.constexpr,
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
    cell = tl.max_contiguous(c[None, :] * d_state + n[:, None], [1, 1])
    slot = tl.max_contiguous(n[:, None] * d_inner + c[None, :], [1, 2])
    rates = tl.max_contiguous(c[None, :] * a_stride_c + n[:, None] * a_stride_n, [1, 1])
    bias = tl.load(dt_bias + c, mask=channel, other=0.0)
    skip = tl.load(D + c, mask=channel, other=0.0)
    rate = tl.load(A + rates, mask=inside, other=0.0) * 1.4426950408889634
    if CHUNKED:
        state = tl.load(starts + tl.minimum(chunk, 1) * d_inner * d_state + slot, mask=inside, other=0.0)
    else:
        state = tl.load(h + cell, mask=inside, other=0.0)
    for before in range(1, chunk):
        total = tl.load(sums + before * d_inner + c, mask=channel, other=0.0)
        local = tl.load(starts + (before + 1) * d_inner * d_state + slot, mask=inside, other=0.0)
        state = tl.exp2(total[None, :] * rate) * state + local
    tl.debug_barrier()  # a chunk that is alone has read h
    u += chunk * CHUNK * u_stride + c
    dt += chunk * CHUNK * dt_stride + c
    z += chunk * CHUNK * z_stride + c
    B += chunk * CHUNK * b_stride + n
    C += chunk * CHUNK * c_stride + n
    out += chunk * CHUNK * d_inner + c
    steps = tl.minimum(tokens - chunk * CHUNK, CHUNK)
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
    if (chunk + 1) * CHUNK >= tokens:
        tl.store(h + cell, state, mask=inside)
