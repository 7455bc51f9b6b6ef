"""Residual streams between the layers of the float model, on disk: one file of float16 for each layer's input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LARGEST = 32768.0  # of a stored value: float16 reaches 65504


class StreamFiles:
    """Streams before each layer, and after the last one; a file that exists is complete.

    Values are float16 after a division by a power of two that keeps the largest in range; the power is in the file's name. The
    last stream is kept in float32 as well, so that a pass that was interrupted goes on with the same numbers.
    """

    def __init__(self, directory: Path, shape: tuple[int, int]) -> None:
        """Use a directory, which is created, for streams of a shape (positions, d_model)."""
        self._directory, self._shape = directory, shape
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, index: int, stream: Tensor) -> None:
        """Store the stream before layer `index`, (positions, d_model) float32, finite; streams are written in order."""
        power = max(0, int(np.ceil(np.log2(max(float(stream.abs().max()), 1.0) / _LARGEST))))
        self._write(f"stream-{index}-{power}.f16", stream.mul(2.0**-power).half())
        self._write(f"last-{index}.f32", stream)
        (self._directory / f"last-{index - 1}.f32").unlink(missing_ok=True)

    def last(self) -> int | None:
        """Return the index of the last stream that is stored, or None."""
        found = [int(file.stem.split("-")[1]) for file in self._directory.glob("last-*.f32")]
        return max(found, default=None)

    def read_last(self) -> Tensor:
        """Return the last stream that is stored, (positions, d_model) float32, unrounded."""
        return self._read(self._directory / f"last-{self.last()}.f32", np.float32)

    def read(self, index: int) -> Tensor:
        """Return the stream before layer `index`, (positions, d_model) float32, to half precision."""
        file = next(self._directory.glob(f"stream-{index}-*.f16"))
        return self._read(file, np.float16).mul_(2.0 ** int(file.stem.split("-")[2]))

    def bytes_to_write(self, count: int) -> int:
        """Return the disk space that streams 0 to `count` - 1 need beyond what is stored."""
        last = self.last()
        missing, values = count if last is None else count - 1 - last, self._shape[0] * self._shape[1]
        return values * (2 * missing + (8 if missing else 0))  # the last two in float32

    def _read(self, file: Path, dtype: type) -> Tensor:
        return torch.from_numpy(np.fromfile(file, dtype).reshape(self._shape)).float()

    def _write(self, name: str, values: Tensor) -> None:
        staged = self._directory / "stream.new"
        with staged.open("wb") as file:
            values.numpy().tofile(file)
        os.replace(staged, self._directory / name)
