"""Safetensors files of ours: written piece by piece, read or mapped only when they hold just what is expected.

The safetensors library writes a file from tensors that are all in memory; the writer here sends the header first, from shapes
alone, then the tensors one after the other, so that a model larger than memory can be quantized. Reading goes through the
library, which validates; mapping too, and then finds the tensors by the validated header, since the library only copies.
Format: 8 bytes little-endian header length, the header as JSON, the data without gaps.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import BundleError
from .recipe import StoredTensor

_CODES = {"uint8": "U8", "int8": "I8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ALIGNMENT = 64  # of the data's start, so that memory-mapped rows can be loaded as whole vectors


def safetensors_header(tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what a file begins with, up to the tensors' values: the same bytes for the same arguments."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for t in tensors:
        end = offset + t.n_bytes
        header[t.name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes the announced tensors in the announced order; leaving the context early leaves a file no reader accepts."""

    def __init__(self, file: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
        """Open the file and write its header, with metadata where some is given. Raises OSError as the file system does."""
        self._waiting = list(tensors)
        head = safetensors_header(self._waiting, metadata)
        self._waiting.reverse()
        self._stream = file.open("wb")
        self._stream.write(head)

    def write(self, name: str, values: np.ndarray) -> None:
        """Append the next tensor; it has to be the one announced."""
        announced = self._waiting.pop()
        assert (name, values.dtype.name, values.shape) == (announced.name, announced.dtype, announced.shape)
        self._stream.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> SafetensorsWriter:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file; after success every announced tensor must be there, and on the disk."""
        with self._stream:
            if kind is None:
                assert not self._waiting
                self._settle()

    def _settle(self) -> None:
        """Have the file on the disk, and out of the cache.

        What was written piece by piece lies in small pages there; read afresh it comes in large ones where the file system can,
        and a decoder reads a quarter faster from them (docs/log.md).
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # only advice
                os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(file: Path, expected: list[StoredTensor] | None) -> Iterator[Any]:
    """Give the library's reader of a file that holds exactly the expected tensors (None: any)."""
    try:
        with safe_open(file, framework="numpy") as stream:
            _check(file, stream, expected)
            yield stream
    except (SafetensorError, OSError, TypeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # mapping it; the file is not at fault
            raise MemoryError(f"{file}: {error.strerror}") from error
        raise BundleError(f"{file}: not a whole safetensors file ({error})") from error


def _check(file: Path, stream: Any, expected: list[StoredTensor] | None) -> None:
    if expected is None:
        return
    names, wanted = set(stream.keys()), {t.name for t in expected}
    if names != wanted:
        odd = sorted(wanted - names)[:4], sorted(names - wanted)[:4]
        raise BundleError(f"{file.name}: missing tensors {odd[0]}, unexpected tensors {odd[1]}")
    for t in expected:
        view = stream.get_slice(t.name)
        got = _DTYPES.get(view.get_dtype(), view.get_dtype()), tuple(view.get_shape())
        if got != (t.dtype, t.shape):
            raise BundleError(f"{file.name}: {t.name} is {got[0]}{got[1]}, expected {t.dtype}{t.shape}")


def read_tensors(file: Path, expected: list[StoredTensor] | None = None) -> dict[str, np.ndarray]:
    """Read a file into memory.

    Args:
        file: what to read.
        expected: exactly these tensors must be in it; None accepts any.

    Raises:
        BundleError: unreadable, or not the expected tensors. MemoryError: no room for it.
    """
    with _opened(file, expected) as stream:
        return {name: stream.get_tensor(name) for name in sorted(stream.keys())}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a file, empty where it has none. Raises BundleError: unreadable."""
    with _opened(file, None) as stream:
        return dict(stream.metadata() or {})


def map_tensors(file: Path, expected: list[StoredTensor]) -> dict[str, np.ndarray]:
    """Map a file into memory: read-only arrays whose pages are read when they are touched, and shared with other processes.

    Args:
        file: what to map. It must not be shortened while it is mapped: touching a lost page ends the process.
        expected: exactly these tensors must be in it.

    Raises:
        BundleError: unreadable, or not the expected tensors. MemoryError: no addresses left to map it to.
    """
    with _opened(file, expected):
        with file.open("rb") as stream:
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Before the first touch: where the file system has large folios, a cold file is then read into pages of 2 MB, and
            # two threads read weights at 34 GB/s instead of 28. Elsewhere it does nothing, or is refused.
            with suppress(OSError):
                view.madvise(mmap.MADV_HUGEPAGE)
        start = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(view[8:start])
    tensors = {}
    for t in expected:
        flat = np.frombuffer(view, t.dtype, math.prod(t.shape), start + header[t.name]["data_offsets"][0])
        # Another writer may have left a tensor where its elements are not aligned; those few are copied.
        tensors[t.name] = np.require(flat, requirements="A").reshape(t.shape)
    return tensors
