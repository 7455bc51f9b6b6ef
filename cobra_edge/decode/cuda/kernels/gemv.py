"""The product of a matrix with one token's activations.

Every byte of the matrix is used once, so this is bound by memory as long as few enough instructions are spent on a byte: an
H200 has about 7 a byte at its 4.3 TB/s. How the work lies:

- A thread takes blocks of 16 bytes whole, as four words, and keeps the 8 to 64 inputs that belong to them in registers for ROWS
  rows. Codes are masked in place (`unpack.centred`); a group's scale is applied after the sum of a block.
- A warp is 4 rows by 8 blocks: 128 neighbouring bytes of each row at a time. With more blocks and fewer rows its threads'
  addresses in x, a block's inputs apart, would fall into the same banks of the multiprocessor's memory.
- The warps of a program take turns along the input axis; a program's rows are 4 · ROWS.
- Codes of the next turn are loaded before those of this one are used.
- With `norm`, the squares of x are summed beside the products, and the root mean square divides the result: one pass. For the
  squares, a turn's inputs are shared out among all threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .matrix import FLOAT_BITS, GpuMatrix
from .tiles import sizes_for
from .unpack import EXPONENT, RUNS, centred, four, load_words, word_of_run

MOST_WARPS = 8


def multiply_one(
    matrix: GpuMatrix, x: Tensor, out: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, add: bool = False
) -> None:
    """Put W x into out, or add it.

    Args:
        matrix: W, (out, in).
        x: (in,) float32, contiguous.
        out: (out,) float32, contiguous; it may not be x.
        norm: (in,) float32, or None. With it x · rsqrt(mean(x²) + eps) · norm takes the place of x.
        eps: see there.
        add: whether to add to out what it would hold.
    """
    n_out, n_in = matrix.shape
    sizes = sizes_for("multiply_one", x.device, matrix.bits)
    programs = triton.cdiv(n_out, 4 * sizes["ROWS"])
    inputs = 8 if matrix.bits == FLOAT_BITS else 16 * RUNS[matrix.bits]
    warps = _warps(programs, triton.cdiv(n_in, inputs), sizes["WARPS"])
    launch(
        _multiply_one,
        (programs,),
        matrix.codes,
        matrix.codes if matrix.scales is None else matrix.scales,
        x,
        x if norm is None else norm,
        out,
        eps,
        EXPONENT,
        OUT=n_out,
        IN=n_in,
        BITS=matrix.bits,
        RUNS=RUNS[matrix.bits],
        GROUP=matrix.group,
        NORMED=norm is not None,
        ADD=add,
        ROWS=sizes["ROWS"],
        WARPS=warps,
        num_warps=warps,
        num_stages=1,  # there is nothing to copy ahead: codes of the next turn wait in registers
    )


def _warps(programs: int, blocks: int, wanted: int) -> int:
    """Return how many warps a program has: until the GPU has as many as wanted, while a row's blocks give all equal turns."""
    warps = 1
    while warps < MOST_WARPS and programs * warps < wanted and blocks % (16 * warps) == 0:
        warps *= 2
    return warps


def multiply_one_reference(
    matrix: GpuMatrix, x: Tensor, out: Tensor, *, norm: Tensor | None = None, eps: float = 0.0, add: bool = False
) -> None:
    """See `multiply_one`."""
    if norm is not None:
        x = x * torch.rsqrt((x * x).mean() + eps) * norm
    product = matrix.dequantize() @ x
    out.copy_(out + product if add else product)


@triton.jit
def _load_x(x, norm, at, inside, NORMED: tl.constexpr):
    """Load four neighbours of x, times norm."""
    values = tl.load(x + at, mask=inside, other=0.0)
    if NORMED:
        values *= tl.load(norm + at, mask=inside, other=0.0)
    return values


@triton.jit
def _add_four(total, word, exponent, x, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Add the products of four x with the codes that lie at bit PLACE of a word's bytes."""
    x0, x1, x2, x3 = four(x)
    total += centred(word, exponent, PLACE, BITS) * x0
    total += centred(word, exponent, PLACE + 8, BITS) * x1
    total += centred(word, exponent, PLACE + 16, BITS) * x2
    total += centred(word, exponent, PLACE + 24, BITS) * x3
    return total


@triton.jit
def _add_block(total, low, top, x, norm, block, inside, exponent, BITS: tl.constexpr, RUNS: tl.constexpr, NORMED: tl.constexpr):
    """Add the products of blocks of codes with their inputs."""
    lows = four(low)
    if BITS == 3:
        tops = tl.split(top)
    for i in tl.static_range(4):
        for s in tl.static_range(RUNS):
            at = (tl.expand_dims(block, -1) * RUNS + s) * 16 + 4 * i + tl.arange(0, 4)
            values = _load_x(x, norm, at, inside, NORMED)
            word = word_of_run(lows[i], tops[i % 2] if BITS == 3 else lows[i], i, s, BITS)
            total = _add_four(total, word, exponent, values, 4 * (s // 2 if BITS == 3 else s), BITS)
    return total


@triton.jit
def _add_floats(total, weights, x, norm, block, inside, NORMED: tl.constexpr, IN: tl.constexpr):
    """Add the products of blocks of eight float16 with their inputs."""
    evens, odds = tl.split(tl.reshape(weights, weights.shape[:-1] + [4, 2]))
    w0, w2, w4, w6 = four(evens)
    w1, w3, w5, w7 = four(odds)
    at = tl.expand_dims(block, -1) * 8 + tl.arange(0, 4)
    values = _load_x(x, norm, at, inside & (at < IN), NORMED)
    x0, x1, x2, x3 = four(values)
    total += w0.to(tl.float32) * x0
    total += w1.to(tl.float32) * x1
    total += w2.to(tl.float32) * x2
    total += w3.to(tl.float32) * x3
    values = _load_x(x, norm, at + 4, inside & (at + 4 < IN), NORMED)
    x4, x5, x6, x7 = four(values)
    total += w4.to(tl.float32) * x4
    total += w5.to(tl.float32) * x5
    total += w6.to(tl.float32) * x6
    total += w7.to(tl.float32) * x7
    return total


@triton.jit
def _load_blocks(codes, row, block, BITS: tl.constexpr, IN: tl.constexpr):
    """Load a block of a row each: words of codes, or eight float16."""
    if BITS == 16:
        at = tl.expand_dims(block, -1) * 8 + tl.arange(0, 8)
        weights = tl.load(codes + tl.expand_dims(row * IN, -1) + at, mask=at < IN, other=0.0)
        return weights, weights
    else:
        return load_words(codes, row * (IN * BITS // 8), block, BITS)


@triton.jit(do_not_specialize=["eps", "exponent"])
def _multiply_one(
    codes, scales, x, norm, out, eps, exponent,
    OUT: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr,
    NORMED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    INPUTS: tl.constexpr = 8 if BITS == 16 else 16 * RUNS
    BLOCKS: tl.constexpr = (IN + INPUTS - 1) // INPUTS
    THREADS: tl.constexpr = 32 * WARPS
    first = tl.program_id(0) * (4 * ROWS)
    # Which block of a turn is a thread's: 8 in a warp, the same ones for each of its four rows.
    thread = tl.arange(0, THREADS)
    place = thread // 32 * 8 + thread % 8
    # What is loaded from the matrix lies in one long axis, rows above threads: however Triton orders axes whose neighbours are
    # no neighbours in memory, threads lie in it as above.
    long = tl.arange(0, ROWS * THREADS)
    long_row = tl.minimum(first + long // THREADS * 4 + long // 8 % 4, OUT - 1).to(tl.int64)
    long_place = long % THREADS // 32 * 8 + long % 8
    sums = tl.zeros((ROWS, THREADS), tl.float32)
    squares = tl.zeros((8 * WARPS * INPUTS,), tl.float32)
    low, top = _load_blocks(codes, long_row, tl.minimum(long_place, BLOCKS - 1), BITS, IN)
    for start in range(0, BLOCKS, 8 * WARPS):
        # Behind a row's end its last block is read once more, and multiplied by zeros.
        block = tl.minimum(start + place, BLOCKS - 1)
        inside = (start + place < BLOCKS)[:, None]
        after = tl.minimum(start + 8 * WARPS + long_place, BLOCKS - 1)
        next_low, next_top = _load_blocks(codes, long_row, after, BITS, IN)
        low = tl.reshape(low, (ROWS, THREADS, low.shape[1]))
        top = tl.reshape(top, (ROWS, THREADS, top.shape[1]))
        if BITS == 16:
            sums = _add_floats(sums, low, x, norm, block, inside, NORMED, IN)
        elif GROUP == IN:
            sums = _add_block(sums, low, top, x, norm, block, inside, exponent, BITS, RUNS, NORMED)
        else:
            # Said to have no neighbours: a thread shall load the scales of its own blocks, not neighbours to hand on.
            group = tl.max_contiguous(tl.minimum(start + long_place, BLOCKS - 1) * INPUTS // GROUP, 1)
            scale = tl.load(scales + long_row * (IN // GROUP) + group).to(tl.float32)
            none = tl.zeros((ROWS, THREADS), tl.float32)
            total = _add_block(none, low, top, x, norm, block, inside, exponent, BITS, RUNS, NORMED)
            sums += total * tl.reshape(scale, (ROWS, THREADS))
        if NORMED:
            every = start * INPUTS + tl.arange(0, 8 * WARPS * INPUTS)
            plain = tl.load(x + every, mask=every < IN, other=0.0)
            squares += plain * plain
        low, top = next_low, next_top
    products = tl.sum(tl.sum(tl.reshape(sums, (ROWS, WARPS, 4, 8)), axis=3), axis=1)
    row = first + tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if BITS != 16 and GROUP == IN:
        products *= tl.load(scales + tl.minimum(row, OUT - 1)).to(tl.float32)
    if NORMED:
        products *= tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)
    if ADD:
        products += tl.load(out + row, mask=row < OUT, other=0.0)
    tl.store(out + row, products, mask=row < OUT)
