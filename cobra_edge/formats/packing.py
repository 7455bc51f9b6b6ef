"""Quantized tensors and the packing of their codes.

The layout is made for vector loads. Codes are packed in blocks along the input axis, and a block in bit planes, the lowest bits
first: one plane of 8 bits, one of 4, or for 3-bit codes one of the low two bits and one of the top bits. In every plane
adjacent bytes belong to adjacent codes: a plane of b bits of a block of n codes has L = n · b / 8 bytes, and byte j holds, from
its lowest bits to its highest, codes j, j + L, j + 2·L and so on. One shift and one mask yield a run of L adjacent codes. Codes
are unsigned; `Scheme.zero_code` is the zero point. docs/bundle.md has the format on one page.

bitsandbytes' formats keep bitsandbytes' layout, so that its matmuls run on the stored bytes; each is a row of `_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .scheme import CodeFormat, Scheme

# Widths of the bit planes, by bits per code, lowest bits first.
_PLANES = {3: (2, 1), 4: (4,), 8: (8,)}

# Values of the codes of format "nf4": quantiles of a normal distribution, scaled to [-1, 1], with an exact 0.
# Source: Dettmers et al. 2023, "QLoRA", appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix as integer codes with one scale per group.

    Attributes:
        codes: (out, in · weight_bits / 8) of the scheme's code_dtype, packed.
        scales: (out, in / group) of the scheme's scale_dtype.
        scheme: defines their meaning.
        clips: (in / group,) float32, positive: if the input of a matmul with this matrix is quantized, the largest magnitude
            that each group keeps; None for no clipping.
    """

    codes: np.ndarray
    scales: np.ndarray
    scheme: Scheme
    clips: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Raise InputError if codes, scales and clips do not match."""
        dtypes = self.scheme.code_dtype, self.scheme.scale_dtype
        if (self.codes.dtype.name, self.scales.dtype.name) != dtypes or self.codes.ndim != 2 or self.scales.ndim != 2:
            raise InputError(
                f"quantized tensor: codes {self.codes.dtype}{self.codes.shape} and scales {self.scales.dtype}"
                f"{self.scales.shape}, expected two-dimensional {dtypes[0]} and {dtypes[1]}"
            )
        n_in = self.shape[1]
        whole = n_in and self.codes.shape[1] * 8 == n_in * self.scheme.weight_bits and not self.scheme.refuses(n_in)
        expected = (self.codes.shape[0], n_in // self.scheme.group(n_in) if n_in else 0)
        if self.scales.shape != expected or not whole:
            raise InputError(f"quantized tensor: scales have shape {self.scales.shape}, expected {expected} for these codes")
        if self.clips is not None and (self.clips.dtype != np.float32 or self.clips.shape != expected[1:]):
            raise InputError(
                f"quantized tensor: clips {self.clips.dtype}{self.clips.shape}, expected float32{expected[1:]}, one per group"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.scheme.weight_bits

    def rows(self, index: np.ndarray | slice) -> QuantizedTensor:
        """Return the rows that `index`, (n,) int64 or a slice, selects: the lookup in a quantized embedding."""
        return QuantizedTensor(self.codes[index], self.scales[index], self.scheme, self.clips)

    def dequantize(self) -> np.ndarray:
        """Return the matrix, (out, in) float32: each code's value times its scale times the format's unit."""
        out, n_in = self.shape
        n_groups = self.scales.shape[1]
        form = _FORMATS[self.scheme.code_format]
        values = form.values(self.codes, self.scheme).reshape(out, n_groups, n_in // n_groups)
        values *= self.scales.astype(np.float32)[..., None]
        if form.unit != 1:
            values *= np.float32(form.unit)
        return values.reshape(out, n_in)


@dataclass(frozen=True)
class _Format:
    """How stored codes are decoded.

    Attributes:
        values: from stored codes and their scheme, each code's value in units of its scale, a new array (out, in) float32.
        unit: a factor for every value.
    """

    values: Callable[[np.ndarray, Scheme], np.ndarray]
    unit: float = 1.0


def _integers(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    values = unpack(codes, scheme).astype(np.float32)
    values -= scheme.zero_code
    return values


def _normal_floats(codes: np.ndarray, _scheme: Scheme) -> np.ndarray:
    """Return the values of NF4 codes, two per byte, the first in the high nibble."""
    pairs = np.stack([codes >> 4, codes & 15], axis=-1)
    return np.asarray(NF4_LEVELS, np.float32)[pairs].reshape(len(codes), 2 * codes.shape[1])


_FORMATS: dict[CodeFormat, _Format] = {
    "int": _Format(_integers),
    "nf4": _Format(_normal_floats),
    # A row's scale is its largest magnitude, which has code 127 or -127.
    "int8-rows": _Format(lambda codes, _: codes.astype(np.float32), unit=1 / 127),
}


def pack(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Pack unsigned codes (out, in) uint8 into bytes (out, in · weight_bits / 8) uint8; 8-bit codes are returned unchanged.

    Raises:
        InputError: in is not a multiple of the scheme's block.
    """
    if scheme.weight_bits == 8:
        return codes
    out, n_in = codes.shape
    if n_in % scheme.block:
        raise InputError(f"{scheme.weight_bits}-bit packing needs in_features to be a multiple of {scheme.block}, got {n_in}")
    n_blocks = n_in // scheme.block
    packed = np.zeros((out, n_blocks, scheme.block * scheme.weight_bits // 8), np.uint8)
    for plane, width, below in _planes(packed, scheme):
        runs = codes.reshape(out, n_blocks, 8 // width, plane.shape[2])
        for i in range(8 // width):
            plane |= ((runs[:, :, i] >> below) & ((1 << width) - 1)) << (i * width)
    return packed.reshape(out, n_in * scheme.weight_bits // 8)


def unpack(packed: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Undo `pack`: return codes (out, in) uint8 from bytes (out, in · weight_bits / 8) uint8."""
    if scheme.weight_bits == 8:
        return packed
    out, n_bytes = packed.shape
    n_blocks = n_bytes * 8 // (scheme.block * scheme.weight_bits)
    codes = np.zeros((out, n_blocks, scheme.block), np.uint8)
    for plane, width, below in _planes(packed.reshape(out, n_blocks, -1), scheme):
        runs = codes.reshape(out, n_blocks, 8 // width, plane.shape[2])
        for i in range(8 // width):
            runs[:, :, i] |= ((plane >> (i * width)) & ((1 << width) - 1)) << below
    return codes.reshape(out, n_blocks * scheme.block)


def _planes(blocks: np.ndarray, scheme: Scheme) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the bit planes of blocks (out, n_blocks, bytes) as views, each with its width and the number of lower bits."""
    start = below = 0
    for width in _PLANES[scheme.weight_bits]:
        n_bytes = scheme.block * width // 8
        yield blocks[:, :, start : start + n_bytes], width, below
        start, below = start + n_bytes, below + width
