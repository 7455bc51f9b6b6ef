"""The shared library: found, loaded, its version checked; its functions, its errors.

The interface is runtimes/cpu/cobra_cpu.h. ctypes releases the interpreter's lock while a function runs. numpy is not imported
here: that would take most of the time of `cobra-edge --version`.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from typing import Any

_INTERFACE = 1  # kCobraInterface
MOST_DIMENSIONS = 4  # kCobraMaxRank
_ERRORS: dict[int, type[Exception]] = {1: ValueError, 2: IndexError, 3: MemoryError}  # CobraCode

_TEXT, _ADDRESS, _INT, _LONG, _FLOAT = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Array(ctypes.Structure):
    """CobraArray: the address, shape and dtype of a contiguous array. The array must outlive it."""

    _fields_ = [("data", _ADDRESS), ("shape", _LONG * MOST_DIMENSIONS), ("rank", _INT), ("dtype", _INT)]


COUNTS = ("d_model", "n_layer", "vocab", "d_inner", "d_state", "d_conv", "dt_rank")


class Sizes(ctypes.Structure):
    """CobraConfig."""

    _fields_ = [
        *((name, _LONG) for name in COUNTS),
        ("norm_eps", _FLOAT),
        ("tied", _INT),
    ]


_ARRAY = ctypes.POINTER(Array)
_ARRAYS = ctypes.POINTER(_ARRAY)
# The arguments of each function that returns a code.
_ARGUMENTS: dict[str, list[Any]] = {
    "cobra_open": [
        ctypes.POINTER(Sizes), ctypes.POINTER(_TEXT), _ARRAY, _LONG, _TEXT, _INT, _INT, ctypes.POINTER(_ADDRESS),
    ],
    "cobra_embed": [_ADDRESS, _ADDRESS, _LONG, _ADDRESS],
    "cobra_step": [_ADDRESS, _LONG, _ADDRESS, _LONG, _ADDRESS, _LONG, _ADDRESS],
    "cobra_forward": [_ADDRESS, _ADDRESS, _LONG, _ADDRESS, _LONG, _ADDRESS, _LONG, _ADDRESS, _INT],
    "cobra_exponential": [_ARRAY, _ARRAY, _TEXT],
    "cobra_rms_norm": [_ARRAY, _ARRAY, _FLOAT, _ARRAY, _TEXT],
    "cobra_multiply": [_ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT, _INT, _ARRAY, _TEXT],
    "cobra_dequantize": [_ARRAY, _ARRAY, _ARRAY, _TEXT],
    "cobra_conv_silu": [_ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _TEXT, _INT],
    "cobra_selective_scan": [_ARRAYS, _ARRAY, _TEXT, _INT],
    "cobra_scan_gradient": [_ARRAYS, _ARRAYS, _TEXT, _INT],
    "cobra_rotate": [_ARRAY, _ARRAY, _TEXT],
    "cobra_read_once": [_ADDRESS, _LONG, _INT, ctypes.POINTER(ctypes.c_uint64)],
    "cobra_peak_macs": [_TEXT, _INT, ctypes.POINTER(ctypes.c_double)],
}  # fmt: skip


def library_file() -> Path | None:
    """Return where the library lies, beside this module or where an editable installation put it; None if there is none."""
    from .. import native

    names = ("libcobra_cpu.so", "libcobra_cpu.dylib", "cobra_cpu.dll")
    places = (Path(place) / name for place in native.__path__ for name in names)
    return next((place for place in places if place.is_file()), None)


def _is_cut(file: Path) -> bool:
    """Return whether an ELF file lacks its end, as after a full disk: the loader would end this process with a bus error."""
    with file.open("rb") as opened:
        header = opened.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):
        return False  # not of 64 bits and little-endian: the loader's to judge
    if len(header) < 64:
        return True
    # The table of sections, at the end of the file: its offset, and the size and number of its entries.
    (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return file.stat().st_size < offset + size * count


@cache
def library() -> ctypes.CDLL:
    """Load the library.

    Raises:
        OSError: there is none, this machine cannot load it, or it belongs to another version of this package.
    """
    file = library_file()
    if file is None:
        raise OSError("this installation has no native library")
    if _is_cut(file):
        raise OSError(f"{file} is incomplete")
    loaded = ctypes.CDLL(str(file))
    try:
        found = loaded.cobra_interface()
    except AttributeError:
        found = None
    if found != _INTERFACE:
        raise OSError(f"{file} belongs to another version of this package")
    loaded.cobra_error.restype = loaded.cobra_kernels.restype = loaded.cobra_kernels_of.restype = _TEXT
    loaded.cobra_kernels.argtypes = [_INT]
    loaded.cobra_kernels_of.argtypes = loaded.cobra_close.argtypes = [_ADDRESS]
    loaded.cobra_close.restype = None
    for name, arguments in _ARGUMENTS.items():
        getattr(loaded, name).argtypes = arguments
    return loaded


def why_not() -> str | None:
    """Return why the native decoder cannot be loaded, with what to do, or None if it can."""
    try:
        library()
    except OSError as error:
        return f"{error}; install the package again: from a wheel of this platform, or with a C++17 compiler available"
    return None


def require(code: int) -> None:
    """Raise what a code says: ValueError, IndexError, MemoryError or RuntimeError, with the library's message."""
    if code:
        raise _ERRORS.get(code, RuntimeError)(library().cobra_error().decode(errors="replace"))


def kernel_names() -> list[str]:
    """Return the names of the instruction sets that this processor supports, best first; the last is plain C++."""
    names: list[str] = []
    while (name := library().cobra_kernels(len(names))) is not None:
        names.append(name.decode())
    return names
