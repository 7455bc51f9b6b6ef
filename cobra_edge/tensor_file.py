"""Write a safetensors file piece by piece, so that a model larger than memory can be quantized.

The safetensors library writes a file from tensors that are all in memory; this writes the header first, from shapes alone,
then the tensors one after the other. Format: 8 bytes little-endian header length, the header as JSON, the data without gaps.
Reading goes through the library, which validates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from .recipe import StoredTensor

_CODES = {"uint8": "U8", "int32": "I32", "float16": "F16", "float32": "F32"}
_ALIGNMENT = 64  # of the data's start, so that memory-mapped rows can be loaded as whole vectors


class TensorFileWriter:
    """Writes the announced tensors in the announced order; leaving the context early leaves a file no reader accepts."""

    def __init__(self, file: Path, tensors: Iterable[StoredTensor]) -> None:
        """Open the file and write its header. Raises OSError as the file system does."""
        self._waiting = list(tensors)
        header, offset = {}, 0
        for t in self._waiting:
            end = offset + math.prod(t.shape) * np.dtype(t.dtype).itemsize
            header[t.name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        self._waiting.reverse()
        self._stream = file.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: np.ndarray) -> None:
        """Append the next tensor; it has to be the one announced."""
        announced = self._waiting.pop()
        assert (name, values.dtype.name, values.shape) == (announced.name, announced.dtype, announced.shape)
        self._stream.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> TensorFileWriter:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file; after success every announced tensor must be there."""
        self._stream.close()
        assert kind is not None or not self._waiting
