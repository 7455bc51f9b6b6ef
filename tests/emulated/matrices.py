"""Matrices for tests of kernels, and how kernels are told of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import SCHEMES

INPUTS = {8: 16, 4: 32, 3: 64}  # of a block of codes


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (out, in), and what a kernel gets of it: codes and scales, or float16."""

    arrays: tuple[np.ndarray, ...]
    kind: str  # as kernels' names have it
    group_shift: int
    n_groups: int
    dense: np.ndarray

    @property
    def layout(self) -> tuple[int, ...]:
        """What kernels of codes get at the end: group_shift and n_groups."""
        return () if self.kind == "f16" else (self.group_shift, self.n_groups)


def random_matrix(scheme_name: str, n_out: int, n_in: int) -> Matrix:
    """Return a matrix of every code and scales of both signs, about as large as a model's."""
    rng = np.random.default_rng(n_out * n_in)
    scheme = SCHEMES[scheme_name]
    if scheme.group_size is None:
        weights = (rng.standard_normal((n_out, n_in)) / 8).astype(np.float16)
        return Matrix((weights,), "f16", 0, 0, weights.astype(np.float32))
    codes = rng.integers(0, 1 << scheme.weight_bits, (n_out, n_in), np.uint8)
    group = scheme.group(n_in)
    scales = rng.standard_normal((n_out, n_in // group)).astype(np.float16)
    scales /= np.float16(4 << scheme.weight_bits)
    packed = QuantizedTensor(pack(codes, scheme), scales, scheme)
    blocks = group // INPUTS[scheme.weight_bits]
    shift = 31 if group == n_in else blocks.bit_length() - 1
    return Matrix((packed.codes, scales), f"w{scheme.weight_bits}", shift, n_in // group, packed.dequantize())


def rounded_bytes(n: int, bits: int) -> int:
    """Return the shared memory that `Rounded` takes for n inputs."""
    whole = -(-n // 128) * 128
    return 2 * whole + 4 * (whole // 128) + 4 * (whole // INPUTS[bits])
