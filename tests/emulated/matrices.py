"""Matrices for tests of kernels, and how kernels are told of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import SCHEMES

INPUTS = {8: 16, 4: 32, 3: 64}  # of a block of codes


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (out, in), and what a kernel gets of it: codes and scales, or float16 with rows apart by a multiple of 8."""

    arrays: tuple[np.ndarray, ...]
    bits: int
    layout: int  # group_shift, or of float16 how far rows are apart
    dense: np.ndarray


def random_matrix(scheme_name: str, n_out: int, n_in: int) -> Matrix:
    """Return a matrix of every code and scales of both signs, about as large as a model's."""
    rng = np.random.default_rng(n_out * n_in)
    scheme = SCHEMES[scheme_name]
    if scheme.group_size is None:
        weights = np.zeros((n_out, -(-n_in // 8) * 8), np.float16)
        weights[:, :n_in] = rng.standard_normal((n_out, n_in)) / 8
        return Matrix((weights,), 16, weights.shape[1], weights[:, :n_in].astype(np.float32))
    codes = rng.integers(0, 1 << scheme.weight_bits, (n_out, n_in), np.uint8)
    group = scheme.group(n_in)
    scales = rng.standard_normal((n_out, n_in // group)).astype(np.float16)
    scales /= np.float16(4 << scheme.weight_bits)
    packed = QuantizedTensor(pack(codes, scheme), scales, scheme)
    shift = 31 if group == n_in else group.bit_length() - 1
    return Matrix((packed.codes, scales), scheme.weight_bits, shift, packed.dequantize())


def rounded_bytes(n: int, bits: int) -> int:
    """Return the shared memory that `Rounded` takes for n inputs."""
    whole = -(-n // 128) * 128
    return 2 * whole + 4 * (whole // 128) + 4 * (whole // INPUTS[bits])
