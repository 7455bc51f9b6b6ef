"""Quantized values and how their codes lie in bytes.

The layout is made for loading whole vectors: 8-bit codes lie one a byte; 4-bit codes lie in blocks of 32 along the input axis,
16 bytes a block, byte j holding code j in its low half and code j + 16 in its high half, so that one mask and one shift
yield two runs of 16 neighbours. Codes are unsigned; `Scheme.zero_code` stands for 0. docs/bundle.md has it on one page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import InputError
from .scheme import Scheme

BLOCK = 32  # 4-bit codes packed together


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix as integer codes with one scale a group.

    Attributes:
        codes: (out, in · weight_bits / 8) uint8, packed.
        scales: (out, in / group_size) float16.
        scheme: how to read them.
    """

    codes: np.ndarray
    scales: np.ndarray
    scheme: Scheme

    def __post_init__(self) -> None:
        """Raise InputError when codes and scales do not fit each other."""
        assert self.scheme.group_size is not None
        if self.codes.dtype != np.uint8 or self.scales.dtype != np.float16 or self.codes.ndim != 2 or self.scales.ndim != 2:
            raise InputError(
                f"quantized tensor: codes {self.codes.dtype}{self.codes.shape} and scales {self.scales.dtype}"
                f"{self.scales.shape}, expected two-dimensional uint8 and float16"
            )
        expected = (self.codes.shape[0], self.shape[1] // self.scheme.group_size)
        if self.scales.shape != expected or self.shape[1] % self.scheme.group_size:
            raise InputError(f"quantized tensor: scales have shape {self.scales.shape}, codes ask for {expected}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.scheme.weight_bits

    def rows(self, index: np.ndarray | slice) -> QuantizedTensor:
        """Return the rows `index` (n,) selects, for a lookup in a quantized embedding."""
        return QuantizedTensor(self.codes[index], self.scales[index], self.scheme)

    def dequantize(self) -> np.ndarray:
        """Return the matrix, (out, in) float32: (code - zero_code) · scale."""
        out, n_in = self.shape
        n_groups = self.scales.shape[1]
        codes = unpack(self.codes, self.scheme).reshape(out, n_groups, n_in // n_groups)
        values = codes.astype(np.float32)
        values -= self.scheme.zero_code
        values *= self.scales.astype(np.float32)[..., None]
        return values.reshape(out, n_in)


def pack(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Pack unsigned codes (out, in) uint8 into bytes (out, in · weight_bits / 8) uint8.

    Raises:
        InputError: in is not a multiple of BLOCK for 4-bit codes.
    """
    if scheme.weight_bits == 8:
        return codes
    out, n_in = codes.shape
    if n_in % BLOCK:
        raise InputError(f"4-bit packing needs in_features to be a multiple of {BLOCK}, got {n_in}")
    blocks = codes.reshape(out, n_in // BLOCK, 2, BLOCK // 2)
    return (blocks[:, :, 0] | (blocks[:, :, 1] << 4)).reshape(out, n_in // 2)


def unpack(packed: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Undo `pack`: return codes (out, in) uint8."""
    if scheme.weight_bits == 8:
        return packed
    out, n_bytes = packed.shape
    blocks = packed.reshape(out, n_bytes * 2 // BLOCK, 1, BLOCK // 2)
    return np.concatenate([blocks & 0xF, blocks >> 4], axis=2).reshape(out, n_bytes * 2)
