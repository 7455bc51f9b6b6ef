"""For one token, what a layer does with its input before the recurrence: the causal convolution, and the product with x_proj.

The product needs all channels and the convolution none but its own, so each program convolves a slice of channels and
multiplies them with their columns of x_proj. The sums over slices are left to the recurrence's kernel, which begins by reading
them: a launch less, and the order of every sum is fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .launch import launch
from .matrix import GpuMatrix
from .tiles import sizes_for
from .unpack import RUNS, centred_run, load_bytes


def n_slices(matrix: GpuMatrix) -> int:
    """Return into how many slices the channels are cut: matrix is x_proj, (rows, d_inner)."""
    return triton.cdiv(matrix.shape[1], _channels(matrix))


def _channels(matrix: GpuMatrix) -> int:
    """Return how many channels a slice has."""
    return sizes_for("convolve_and_project", matrix.codes.device, matrix.bits)["CHANNELS"]


def convolve_and_project(
    matrix: GpuMatrix, xz: Tensor, state: Tensor, layer: int, weight: Tensor, bias: Tensor, u: Tensor, partials: Tensor
) -> None:
    """Move the convolution's window on by one token; its result and that one's products with slices of x_proj.

    Args:
        matrix: x_proj, (rows, d_inner), rows being dt_rank + 2 · d_state.
        xz: (2 · d_inner,) float32; its first half is the convolution's input.
        state: (1,) int64, the address of the windows, (n_layer, d_inner, d_conv) float32, the newest last; they are updated.
            The reference takes the windows themselves.
        layer: which of them.
        weight: (d_inner, d_conv) float32.
        bias: (d_inner,) float32.
        u: (d_inner,) float32; becomes silu(bias + the sum of weight times window).
        partials: (n_slices, rows) float32; becomes x_proj u, each row's sum over one slice of channels.
    """
    n_rows, n_inner = matrix.shape
    sizes = sizes_for("convolve_and_project", matrix.codes.device, matrix.bits)
    launch(
        _convolve_and_project,
        (n_slices(matrix),),
        matrix.codes,
        matrix.codes if matrix.scales is None else matrix.scales,
        xz,
        state,
        layer,
        weight,
        bias,
        u,
        partials,
        ROWS=n_rows,
        INNER=n_inner,
        TAPS=weight.shape[1],
        BITS=matrix.bits,
        RUNS=RUNS[matrix.bits],
        GROUP=matrix.group,
        ROWS_TILE=triton.next_power_of_2(n_rows),
        TAPS_TILE=triton.next_power_of_2(weight.shape[1]),
        **sizes,
    )


def convolve_and_project_reference(
    matrix: GpuMatrix, xz: Tensor, state: Tensor, layer: int, weight: Tensor, bias: Tensor, u: Tensor, partials: Tensor
) -> None:
    """See `convolve_and_project`."""
    window = state[layer]
    window.copy_(torch.cat([window[:, 1:], xz[: matrix.shape[1], None]], dim=1))
    u.copy_(functional.silu((window * weight).sum(dim=1) + bias))
    products = matrix.dequantize() * u
    for row, columns in zip(partials, products.split(_channels(matrix), dim=1), strict=True):
        row.copy_(columns.sum(dim=1))


@triton.jit
def _convolve(xz, window, weight, bias, u, channel, inside, TAPS: tl.constexpr, TAPS_TILE: tl.constexpr):
    """Update the windows of channels (a, b) and return their u; 0 where it is not inside."""
    tap = tl.arange(0, TAPS_TILE)[None, None, :]
    at = channel[:, :, None] * TAPS + tap
    held = inside[:, :, None] & (tap < TAPS)
    new = tl.load(xz + channel, mask=inside, other=0.0)
    moved = tl.load(window + at + 1, mask=held & (tap < TAPS - 1), other=0.0)
    moved = tl.where(tap == TAPS - 1, new[:, :, None], moved)
    sums = tl.sum(moved * tl.load(weight + at, mask=held, other=0.0), axis=2)
    sums += tl.load(bias + channel, mask=inside, other=0.0)
    result = sums * tl.sigmoid(sums)
    tl.store(u + channel, result, mask=inside)
    # A thread may store what lies where another loads: after all have.
    tl.debug_barrier()
    tl.store(window + at, moved, mask=held)
    return result


@triton.jit(do_not_specialize=["layer"])
def _convolve_and_project(
    codes, scales, xz, state, layer, weight, bias, u, partials,
    ROWS: tl.constexpr, INNER: tl.constexpr, TAPS: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr,
    ROWS_TILE: tl.constexpr, TAPS_TILE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    slice_number = tl.program_id(0)
    BLOCKS: tl.constexpr = CHANNELS // (16 * RUNS)
    address = tl.multiple_of(tl.load(state).to(tl.pointer_type(tl.float32)), 16)
    window = address + layer.to(tl.int64) * (INNER * TAPS)
    row = tl.arange(0, ROWS_TILE)[:, None, None]
    block = slice_number * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    lane = tl.arange(0, 16)[None, :]
    whole = (row < ROWS) & (block * (16 * RUNS) < INNER)[None]
    if BITS != 16:
        low, top = load_bytes(codes, row * (INNER * BITS // 8), block[None], lane[None], whole, BITS)
    sums = tl.zeros((ROWS_TILE, BLOCKS), tl.float32)
    for s in tl.static_range(RUNS):
        channel = (block * RUNS + s) * 16 + lane
        inside = channel < INNER
        values = _convolve(xz, window, weight, bias, u, channel, inside, TAPS, TAPS_TILE)
        if BITS == 16:
            weights = tl.load(codes + row * INNER + channel[None], mask=(row < ROWS) & inside[None], other=0.0).to(tl.float32)
        else:
            weights = centred_run(low, top, s, BITS).to(tl.float32)
        sums += tl.sum(weights * values[None], axis=2)
    row = tl.arange(0, ROWS_TILE)
    if BITS != 16:
        blocks = slice_number * BLOCKS + tl.arange(0, BLOCKS)
        group = blocks * (16 * RUNS) // GROUP
        held = (row < ROWS)[:, None] & (blocks * (16 * RUNS) < INNER)[None, :]
        sums *= tl.load(scales + (row * (INNER // GROUP))[:, None] + group[None, :], mask=held, other=0.0).to(tl.float32)
    tl.store(partials + slice_number * ROWS + row, tl.sum(sums, axis=1), mask=row < ROWS)
