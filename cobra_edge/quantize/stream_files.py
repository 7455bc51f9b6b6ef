"""Residual streams between the layers of the float model, on disk: one file of float16 for each layer's input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LARGEST = 32768.0  # of a stored value: float16 reaches 65504


class StreamFiles:
    """Streams before each layer, and after the last one; a stream that exists is complete.

    Values are float16 after a division by a power of two that keeps the largest in range; the power is in the file's name.
    """

    def __init__(self, directory: Path, shape: tuple[int, int]) -> None:
        """Use a directory, which is created, for streams of a shape (positions, d_model)."""
        self._directory, self._shape = directory, shape
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, index: int, stream: Tensor) -> None:
        """Store the stream before layer `index`, (positions, d_model) float32, finite."""
        power = max(0, int(np.ceil(np.log2(max(float(stream.abs().max()), 1.0) / _LARGEST))))
        staged = self._directory / f"stream-{index}.new"
        with staged.open("wb") as file:
            stream.mul(2.0**-power).half().numpy().tofile(file)
        os.replace(staged, self._directory / f"stream-{index}-{power}.f16")

    def bytes_to_write(self, count: int) -> int:
        """Return the disk space that streams 0 to `count` - 1 need beyond what is stored."""
        return (count - 1 - (-1 if (last := self.last()) is None else last)) * 2 * self._shape[0] * self._shape[1]

    def last(self) -> int | None:
        """Return the index of the last stream that is stored, or None."""
        found = [int(file.stem.split("-")[1]) for file in self._directory.glob("stream-*.f16")]
        return max(found, default=None)

    def read(self, index: int) -> Tensor:
        """Return the stream before layer `index`, (positions, d_model) float32."""
        file = next(self._directory.glob(f"stream-{index}-*.f16"))
        values = np.fromfile(file, np.float16).reshape(self._shape)
        return torch.from_numpy(values.astype(np.float32)).mul_(2.0 ** int(file.stem.split("-")[2]))
