"""The rotation of cobra_edge/formats/hadamard.py on a GPU, and a norm between two of them.

R = kron(H_m, H_p) / √(m · p): H_m comes from a small table while a row is read, its m parts of p numbers mixed into m others.
H_p is log2(p) rounds of sums and differences in registers. Each round does the lowest bit of the index and rotates it to the
top, so that after the last one all bits are back in their places and no round is different. A program makes some of the m parts
of a row: one token's rotation is then the work of m programs, each of which reads all of it.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

from ....formats.hadamard import hadamard_factors, hadamard_matrix
from .elementwise import stored, stored_reference
from .launch import launch
from .norm import rms_norm_many_reference
from .tiles import sizes_for


def rotate_many(x: torch.Tensor, out: torch.Tensor, *, back: bool = False) -> None:
    """Rotate every row: out = x Rᵀ, or with `back` x R, which undoes it.

    Args:
        x: (T, width) float32 or float16; rows may be apart.
        out: (T, width) float16, saturated, or float32, contiguous; not x itself.
        back: by the transpose.

    Raises:
        InputError: width has no Hadamard matrix.
    """
    tokens, width = x.shape
    shape = _shape(width)
    sizes = sizes_for("rotate_many", x.device, tokens=tokens)
    table = _mixing(shape["M"], x.device, back)
    grid = (tokens, triton.cdiv(shape["M"], sizes["PARTS"]))
    launch(_rotate_rows, grid, x, table, out, width**-0.5, x_stride=x.stride(0), **shape, **sizes)


def rotate_many_reference(x: torch.Tensor, out: torch.Tensor, *, back: bool = False) -> None:
    """Do what `rotate_many` does."""
    matrix = torch.from_numpy(hadamard_matrix(x.shape[1])).to(x.device)
    rotated = x.float() @ (matrix if back else matrix.T) / math.sqrt(x.shape[1])
    out.copy_(stored_reference(rotated, out.dtype))


def norm_between_rotations(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Turn every row back, norm it, weigh it, and rotate it again: the last norm of a decoder whose residual is rotated.

    Args:
        x: (T, width) float32; rows may be apart.
        weight: (width,) float32, of channels that are not rotated.
        eps: added to the mean square.
        out: (T, width) float16, saturated, or float32, contiguous; not x itself. float16 takes memory for what is in between.

    Raises:
        InputError: width has no Hadamard matrix.
    """
    tokens, width = x.shape
    between = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    shape = _shape(width)
    sizes = {"PARTS": triton.next_power_of_2(shape["M"]), **sizes_for("norm_between_rotations", x.device)}
    tables = (_mixing(shape["M"], x.device, True), _mixing(shape["M"], x.device, False))
    launch(_norm_rows, (tokens,), x, *tables, weight, eps, between, out, width**-0.5, x_stride=x.stride(0), **shape, **sizes)


def norm_between_rotations_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Do what `norm_between_rotations` does."""
    upright, normed = torch.empty_like(x), torch.empty_like(x)
    rotate_many_reference(x, upright, back=True)
    rms_norm_many_reference(upright, weight, eps, normed)
    rotate_many_reference(normed, out)


def _shape(width: int) -> dict[str, int]:
    m, p = hadamard_factors(width)
    return {"M": m, "P": p, "LOG_P": p.bit_length() - 1}


@cache
def _mixing(m: int, device: torch.device, back: bool) -> torch.Tensor:
    """Return the table (m, m) float32 in which row j says how much of row j goes where: H_mᵀ, or H_m for the way back."""
    matrix = torch.from_numpy(hadamard_matrix(m)) if m > 1 else torch.ones(1, 1)
    return (matrix if back else matrix.T).contiguous().to(device)


@triton.jit
def _rotated(row, table, i, M: tl.constexpr, P: tl.constexpr, LOG_P: tl.constexpr, PARTS: tl.constexpr):
    """Return parts i of kron(H_m, H_p) times the row that a pointer shows, as a tile (PARTS, P)."""
    p = tl.arange(0, P)
    y = tl.zeros((PARTS, P), tl.float32)
    for j in tl.static_range(M):
        goes = tl.load(table + j * M + i, mask=i < M, other=0.0)
        y += goes[:, None] * tl.load(row + j * P + p).to(tl.float32)[None, :]
    for _ in tl.static_range(LOG_P):
        even, odd = tl.split(tl.reshape(y, (PARTS, P // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (PARTS, P))
    return y


@triton.jit
def _rotate_rows(
    x,
    table,
    out,
    scale,
    x_stride: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    LOG_P: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program some parts of a row."""
    row = tl.program_id(0).to(tl.int64)
    i, p = tl.program_id(1) * PARTS + tl.arange(0, PARTS), tl.arange(0, P)
    y = _rotated(x + row * x_stride, table, i, M, P, LOG_P, PARTS) * scale
    cell = row * (M * P) + i[:, None] * P + p[None, :]
    tl.store(out + cell, stored(y, out.dtype.element_ty), mask=(i < M)[:, None] & (p < P)[None, :])


@triton.jit
def _norm_rows(
    x,
    back,
    forth,
    weight,
    eps,
    between,
    out,
    scale,
    x_stride: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    LOG_P: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program a row. What is between the rotations is written down: H_m mixes parts of a row while they are read."""
    row = tl.program_id(0).to(tl.int64)
    i, p = tl.arange(0, PARTS), tl.arange(0, P)
    inside = (i < M)[:, None] & (p < P)[None, :]
    within = i[:, None] * P + p[None, :]
    between += row * (M * P)
    upright = _rotated(x + row * x_stride, back, i, M, P, LOG_P, PARTS) * scale
    upright *= 1.0 / tl.sqrt(tl.sum(upright * upright) / (M * P) + eps)
    tl.store(between + within, upright * tl.load(weight + within, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()  # all of it is written
    y = _rotated(between, forth, i, M, P, LOG_P, PARTS) * scale
    tl.debug_barrier()  # all of it is read, and `out` may be the same
    tl.store(out + row * (M * P) + within, stored(y, out.dtype.element_ty), mask=inside)
