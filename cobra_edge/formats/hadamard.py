"""Hadamard matrices and rotations, which spread outliers over all channels at almost no cost.

A Hadamard matrix has entries ±1 and orthogonal rows; divided by the square root of its order it is orthonormal, so
W y = (W Rᵀ)(R y). A few channels of out_proj's input y are much larger than the others: errors in their columns of W cost most,
and they alone determine the scale of a group of quantized activations. After R every channel has a share of each (Ashkboos et
al. 2024, "QuaRot"; Chiang et al. 2025, "Quamba2"). A bundle stores W Rᵀ, a runtime computes R y.

R = kron(H_m, H_p) / √(m · p). H_p is Sylvester's matrix of a power of two in natural order, applied by a fast Walsh-Hadamard
transform in log2(p) rounds; H_m is Paley's first construction of order m = q + 1, with q prime and q mod 4 = 3 (Paley 1933).
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import InputError

# Widths come from a manifest, so the work per width is bounded. Published models have m = 1, 12 or 20; every token's row is
# multiplied by H_m, and a GPU kernel is unrolled m times.
LARGEST_PALEY_ORDER = 256
LARGEST_WRITTEN_OUT = 8192  # 256 MiB


def hadamard_matrix(order: int) -> np.ndarray:
    """Return the Hadamard matrix kron(H_m, H_p) of `hadamard_factors(order)`, (order, order) float32, entries ±1.

    Raises:
        InputError: no such matrix is known here, or it is too large to materialize.
    """
    base, power = hadamard_factors(order)
    if order > LARGEST_WRITTEN_OUT:
        raise InputError(
            f"a Hadamard matrix of order {order} would take {4 * order**2 / 1e9:.1f} GB, the limit is order "
            f"{LARGEST_WRITTEN_OUT}; rotate by its two factors, as every decoder except torch does"
        )
    matrix = _paley(base) if base > 1 else np.ones((1, 1), np.float32)
    for _ in range(power.bit_length() - 1):
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.float32))
    return matrix


def hadamard_factors(width: int) -> tuple[int, int]:
    """Return (m, p) with width = m · p: p the largest power of two for which m is 1 or the order of a Paley matrix.

    5120 is 20 · 256, 1536 is 12 · 128, 512 is 1 · 512.

    Raises:
        InputError: width has no such factors.
    """
    if width > 0:
        base = width // (width & -width)  # the odd part
        while width % base == 0 and base <= LARGEST_PALEY_ORDER:
            if base == 1 or _is_paley_order(base):
                return base, width // base
            base *= 2
    raise InputError(
        f"width {width} has no Hadamard matrix here: expected a power of two, or a power of two times 12, 20, 44, 60 or "
        f"another q + 1 of at most {LARGEST_PALEY_ORDER} with q prime and q mod 4 = 3"
    )


def rotate(x: np.ndarray) -> np.ndarray:
    """Return x Rᵀ for the orthonormal R = kron(H_m, H_p) / √width: every vector along the last axis rotated.

    Args:
        x: (..., width) float32, width = m · p as `hadamard_factors` says.

    Returns:
        (..., width) float32, a new array.

    Raises:
        InputError: width has no Hadamard matrix.
    """
    width = x.shape[-1]
    base, power = hadamard_factors(width)
    y = np.array(x, np.float32).reshape(-1, base, power)
    if base > 1:
        y = hadamard_matrix(base) @ y
    return _butterflies(y).reshape(x.shape) / np.float32(math.sqrt(width))


def unrotate(x: np.ndarray) -> np.ndarray:
    """Return x R, the inverse of `rotate`: (..., width) float32 to (..., width) float32. Raises what `rotate` raises."""
    width = x.shape[-1]
    base, power = hadamard_factors(width)
    back = hadamard_matrix(base).T @ _butterflies(np.array(x, np.float32).reshape(-1, base, power))
    return back.reshape(x.shape) / np.float32(math.sqrt(width))


def _butterflies(y: np.ndarray) -> np.ndarray:
    """Return y (n, m, p) times Sylvester's matrix of order p, along the last axis; it is symmetric."""
    shape, power, half = y.shape, y.shape[-1], 1
    while half < power:
        pairs = y.reshape(-1, 2, half)
        a, b = pairs[:, 0], pairs[:, 1]
        y = np.stack([a + b, a - b], axis=1)
        half *= 2
    return y.reshape(shape)


def _is_paley_order(order: int) -> bool:
    q = order - 1
    return q % 4 == 3 and all(q % d for d in range(3, math.isqrt(q) + 1, 2))


def _paley(order: int) -> np.ndarray:
    """Return I + S of order q + 1: S has 0 in its corner, ones right of it, -1 below it, and Q[i, j] = chi(i - j) in the rest.

    chi(n) is 0 where q divides n, 1 where n is a square modulo q, and -1 elsewhere.
    """
    q = order - 1
    chi = np.full(q, -1, np.float32)
    chi[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    chi[0] = 0
    matrix = np.ones((order, order), np.float32)
    matrix[1:, 0] = -1
    rest = np.arange(q)
    matrix[1:, 1:] = chi[(rest[:, None] - rest[None, :]) % q]
    matrix[1:, 1:] += np.eye(q, dtype=np.float32)
    return matrix
