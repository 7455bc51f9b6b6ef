"""The product of a matrix with many tokens' activations, on tensor cores.

A program has a tile of the matrix's rows by a tile of tokens. Codes become float16 in registers, where code - zero is exact,
and are the first operand of the product, which tensor cores take from registers; activations are the second, from shared
memory. A block holds several runs of inputs in the same bytes, so a tile of bytes is one product a run, with the columns of x
that belong to it.

Where a row has one scale, it multiplies the sums at the end. A group's scale multiplies its weights, in float16 before the
product, an error of 2^-12 of a weight at most, which is that of the activations too: sums of a group kept apart would be as
many multiplications again for 128 tokens, and would have each product wait for the one before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .matrix import GpuMatrix
from .tiles import sizes_for
from .unpack import RUNS, centred_run, load_bytes

LARGEST = 65504.0  # of float16


def multiply_many(matrix: GpuMatrix, x: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Put x Wᵀ into out, or add it.

    Args:
        matrix: W, (out, in).
        x: (tokens, in) float16; rows may lie apart.
        out: (tokens, out) float16, where too large values become ±65504, or float32; rows may lie apart.
        add: whether to add to out what it would hold; float32 only.
    """
    _expect(matrix, x, out, add)
    tokens = x.shape[0]
    sizes = sizes_for("multiply_many", x.device, matrix.bits, tokens)
    n_out, n_in = matrix.shape
    launch(
        _multiply_many,
        (triton.cdiv(n_out, sizes["OUTS"]) * triton.cdiv(tokens, sizes["TOKENS"]),),
        matrix.codes,
        matrix.codes if matrix.scales is None else matrix.scales,
        x,
        out,
        tokens,
        x.stride(0),
        out.stride(0),
        OUT=n_out,
        IN=n_in,
        BITS=matrix.bits,
        RUNS=RUNS[matrix.bits],
        GROUP=matrix.group,
        ADD=add,
        **sizes,
    )


def multiply_many_reference(matrix: GpuMatrix, x: Tensor, out: Tensor, *, add: bool = False) -> None:
    """See `multiply_many`."""
    _expect(matrix, x, out, add)
    product = x.float() @ matrix.dequantize().T
    if add:
        product += out
    out.copy_(product if out.element_size() == 4 else product.clamp(-LARGEST, LARGEST))


def _expect(matrix: GpuMatrix, x: Tensor, out: Tensor, add: bool) -> None:
    assert x.shape == (out.shape[0], matrix.shape[1]) and out.shape[1] == matrix.shape[0], (x.shape, matrix.shape, out.shape)
    assert x.stride(1) == out.stride(1) == 1, "only rows may lie apart"
    assert not add or out.element_size() == 4, "sums are float32"


@triton.jit
def _tile_of(program, tokens, OUT: tl.constexpr, OUTS: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr):
    """Return which tiles of rows and tokens are a program's: TOGETHER tiles of rows go through all tokens before the next."""
    row_tiles: tl.constexpr = (OUT + OUTS - 1) // OUTS
    in_group = TOGETHER * tl.cdiv(tokens, TOKENS)
    first = program // in_group * TOGETHER
    n_rows = tl.minimum(row_tiles - first, TOGETHER)
    place = program % in_group
    return first + place % n_rows, place // n_rows


@triton.jit
def _load_scales(scales, row, start, IN: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr):
    """Load the scales of a tile of bytes from `start` on, broadcastable to it; (rows, 1) where one group holds it all."""
    groups: tl.constexpr = IN // GROUP
    if GROUP % (BYTES * RUNS) == 0:
        return tl.load(scales + row * groups + start * RUNS // GROUP)[:, None]
    else:
        blocks: tl.constexpr = BYTES // 16
        # Behind the last block there is nothing in x either.
        group = tl.minimum((start + tl.arange(0, blocks) * 16) * RUNS // GROUP, groups - 1)
        found = tl.load(scales + (row * groups)[:, None] + group[None, :])
        spread = tl.broadcast_to(found[:, :, None], (row.shape[0], blocks, 16))
        return tl.reshape(spread, (row.shape[0], BYTES))


@triton.jit(do_not_specialize=["tokens"])
def _multiply_many(
    codes, scales, x, out, tokens, x_stride, out_stride,
    OUT: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
    OUTS: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    row_tile, token_tile = _tile_of(tl.program_id(0), tokens, OUT, OUTS, TOKENS, TOGETHER)
    rows = row_tile * OUTS + tl.arange(0, OUTS)
    columns = token_tile * TOKENS + tl.arange(0, TOKENS)
    # What lies behind the last row or token is computed from that one, and not stored.
    row = tl.minimum(rows, OUT - 1).to(tl.int64)
    token = tl.minimum(columns, tokens - 1).to(tl.int64)
    length: tl.constexpr = IN // RUNS  # of a row of low bytes, or of numbers
    sums = tl.zeros((OUTS, TOKENS), tl.float32)
    for start in range(0, length, BYTES):
        place = start + tl.arange(0, BYTES)
        inside = place < length
        block, lane = place // 16, place % 16
        if BITS == 16:
            low = tl.load(codes + (row * IN)[:, None] + place[None, :], mask=inside[None, :], other=0.0)
        else:
            offset = (row * (IN * BITS // 8))[:, None]
            low, top = load_bytes(codes, offset, block[None, :], lane[None, :], inside[None, :], BITS)
            if GROUP != IN:
                scale = _load_scales(scales, row, start, IN, RUNS, GROUP, BYTES)
        for s in tl.static_range(RUNS):
            at = (block * RUNS + s) * 16 + lane
            inputs = tl.load(x + (token * x_stride)[None, :] + at[:, None], mask=inside[:, None], other=0.0)
            if BITS == 16:
                weights = low
            else:
                weights = centred_run(low, top, s, BITS)
                if GROUP != IN:
                    weights *= scale
            sums = tl.dot(weights, inputs, sums)
    if BITS != 16 and GROUP == IN:
        sums *= tl.load(scales + row).to(tl.float32)[:, None]
    target = out + (token * out_stride)[None, :] + row[:, None]
    stored = (rows < OUT)[:, None] & (columns < tokens)[None, :]
    if ADD:
        sums += tl.load(target, mask=stored, other=0.0)
    if out.dtype.element_ty == tl.float16:
        sums = tl.clamp(sums, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(target, sums.to(out.dtype.element_ty), mask=stored)
