"""Safetensors files: a streaming writer, and readers that accept only the expected tensors.

The safetensors library writes a file from tensors that are all in memory. The writer here writes the header first, from shapes
alone, then one tensor at a time, so that a model larger than memory can be quantized. Reading goes through the library, which
validates the file. So does memory-mapping, which then locates the tensors by the validated header, because the library only
copies. Format: 8 bytes little-endian header length, the header as JSON, the data without gaps.
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
    """Return the length prefix and header of a file; deterministic."""
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
    """Writes the declared tensors in the declared order. After an exception in the context, readers reject the file."""

    def __init__(self, file: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
        """Open the file and write its header, with optional metadata. Raises OSError."""
        self._waiting = list(tensors)
        head = safetensors_header(self._waiting, metadata)
        self._waiting.reverse()
        self._stream = file.open("wb")
        self._stream.write(head)

    def write(self, name: str, values: np.ndarray) -> None:
        """Append the next tensor; name, shape and dtype must be those declared."""
        announced = self._waiting.pop()
        assert (name, values.dtype.name, values.shape) == (announced.name, announced.dtype, announced.shape)
        self._stream.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> SafetensorsWriter:
        """Return self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file; after success all declared tensors must have been written and are synced to disk."""
        with self._stream:
            if kind is None:
                assert not self._waiting
                self._settle()

    def _settle(self) -> None:
        """Sync the file to disk and drop it from the page cache.

        After streaming writes the page cache holds small pages. Reading the file back fills large ones if the file system
        supports them, and a decoder reads a quarter faster from those (docs/log.md).
        """
        self._stream.flush()
        os.fsync(self._stream.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # only advice
                os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(file: Path, expected: list[StoredTensor] | None) -> Iterator[Any]:
    """Yield the library's reader for a file with exactly the expected tensors (None: any)."""
    try:
        with safe_open(file, framework="numpy") as stream:
            _check(file, stream, expected)
            yield stream
    except (SafetensorError, OSError, TypeError) as error:
        _require_room(file)  # each release of the library says otherwise that there was none; the file is fine then
        raise BundleError(f"{file}: not a complete safetensors file ({error})") from error


def _require_room(file: Path) -> None:
    """Raise MemoryError if the address space is too small for a file that can be opened."""
    with suppress(ValueError), suppress(OSError), file.open("rb") as stream:  # an empty file; one that cannot be read
        try:
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ).close()
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"{file}: {error.strerror}") from error
            raise


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
    """Read a file into memory; returns arrays by name, of the expected shapes and dtypes.

    Args:
        file: what to read.
        expected: the file must contain exactly these tensors; None accepts any.

    Raises:
        BundleError: unreadable, or not the expected tensors. MemoryError: too little memory.
    """
    with _opened(file, expected) as stream:
        return {name: stream.get_tensor(name) for name in sorted(stream.keys())}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a file, possibly empty. Raises BundleError if it is unreadable."""
    with _opened(file, None) as stream:
        return dict(stream.metadata() or {})


def map_tensors(file: Path, expected: list[StoredTensor]) -> dict[str, np.ndarray]:
    """Memory-map a file; returns read-only arrays by name, of the expected shapes and dtypes.

    Args:
        file: what to map. It must not be truncated while it is mapped: reading a lost page kills the process.
        expected: the file must contain exactly these tensors.

    Raises:
        BundleError: unreadable, or not the expected tensors. MemoryError: the address space is exhausted.
    """
    with _opened(file, expected):
        with file.open("rb") as stream:
            view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Before the first access: on file systems with large folios a cold file is then read into 2 MB pages, and two
            # threads read weights at 34 GB/s instead of 28. Elsewhere it has no effect, or is refused.
            with suppress(OSError):
                view.madvise(mmap.MADV_HUGEPAGE)
        start = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(view[8:start])
    tensors = {}
    for t in expected:
        flat = np.frombuffer(view, t.dtype, math.prod(t.shape), start + header[t.name]["data_offsets"][0])
        # Other writers may leave tensors unaligned; those few are copied.
        tensors[t.name] = np.require(flat, requirements="A").reshape(t.shape)
    return tensors
