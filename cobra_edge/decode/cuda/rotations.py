"""What the rotation kernels are told of a width: its factors, and the signs of their Hadamard matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...formats.hadamard import hadamard_factors, hadamard_matrix
from .launch import Address, Queue

_MOST_POWER = 256  # neighbours that one block of `rotate` makes: many blocks share a row


@dataclass(frozen=True)
class RotationSigns:
    """Of one width, on the host.

    Attributes:
        m, p: width = m · p, see `hadamard_factors`.
        base, power: the same width cut for `rotate`, power a power of two.
        forth, back: (base, base) float32 of ±1.
        words, words_back: (m, (m + 31) / 32) uint32, a bit a -1: H_m and its transpose, for `rotate_rows`.
    """

    m: int
    p: int
    base: int
    power: int
    forth: np.ndarray
    back: np.ndarray
    words: np.ndarray
    words_back: np.ndarray

    @classmethod
    def of(cls, width: int) -> RotationSigns:
        """Return the signs of a width that has a Hadamard matrix. Raises InputError for another."""
        m, p = hadamard_factors(width)
        power = min(p, _MOST_POWER)
        small = hadamard_matrix(m)
        forth = np.kron(small, hadamard_matrix(p // power))
        return cls(m, p, width // power, power, forth, np.ascontiguousarray(forth.T), _words(small), _words(small.T))


def _words(signs: np.ndarray) -> np.ndarray:
    """Return a bit for each -1, the first in the lowest place of a row's first word."""
    rows, columns = signs.shape
    bits = np.zeros((rows, -(-columns // 32) * 32), np.uint8)
    bits[:, :columns] = signs < 0
    return np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)


@dataclass(frozen=True)
class Rotation:
    """Of one width, on the GPU; attributes as of `RotationSigns`."""

    width: int
    m: int
    p: int
    base: int
    power: int
    forth: Address
    back: Address
    words: Address
    words_back: Address

    def rotate(
        self, queue: Queue, x: Address, out: Address, rows: int, *, back: bool = False, after: Address | None = None
    ) -> None:
        """Enqueue the rotation of rows (rows, width) float32, or its undoing; then times `after` (width,) where it is given."""
        signs, grid = self.back if back else self.forth, (self.base, rows, 1)
        factor = float(self.width**-0.5)
        queue.launch("rotate", grid, 256, x, signs, after, out, self.base, self.power, factor, shared_bytes=4 * self.power)
