"""Rows of an embedding that may lie in codes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .matrix import GpuMatrix
from .tiles import sizes_for
from .unpack import RUNS, centred_run, load_bytes


def look_up(matrix: GpuMatrix, tokens: Tensor, out: Tensor) -> None:
    """Put a row of the matrix for each token into out.

    Args:
        matrix: (vocab, d_model).
        tokens: (n,) int64, each below vocab.
        out: (n, d_model) float32; rows may lie apart.
    """
    sizes = sizes_for("look_up", out.device, matrix.bits)
    n_in = matrix.shape[1]
    runs = RUNS[matrix.bits]
    launch(
        _look_up,
        (tokens.shape[0], triton.cdiv(n_in // runs, sizes["BYTES"])),
        matrix.codes,
        matrix.codes if matrix.scales is None else matrix.scales,
        tokens,
        out,
        out.stride(0),
        IN=n_in,
        BITS=matrix.bits,
        RUNS=runs,
        GROUP=matrix.group,
        **sizes,
    )


def look_up_reference(matrix: GpuMatrix, tokens: Tensor, out: Tensor) -> None:
    """See `look_up`."""
    out.copy_(matrix.dequantize()[tokens])


@triton.jit
def _look_up(
    codes, scales, tokens, out, out_stride,
    IN: tl.constexpr, BITS: tl.constexpr, RUNS: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(tokens + number)
    target = out + number * out_stride
    place = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = place < IN // RUNS
    if BITS == 16:
        tl.store(target + place, tl.load(codes + row * IN + place, mask=inside, other=0.0).to(tl.float32), mask=inside)
    else:
        block, lane = place // 16, place % 16
        low, top = load_bytes(codes, row * (IN * BITS // 8), block, lane, inside, BITS)
        scale = tl.load(scales + row * (IN // GROUP) + block * 16 * RUNS // GROUP, mask=inside, other=0.0).to(tl.float32)
        for s in tl.static_range(RUNS):
            values = centred_run(low, top, s, BITS).to(tl.float32) * scale
            tl.store(target + (block * RUNS + s) * 16 + lane, values, mask=inside)
