"""Arguments of the library's functions: arrays, their memory, and integers that C would cut."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .library import MOST_DIMENSIONS, Array

_DTYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2, np.dtype(np.uint8): 3}  # CobraDtype
_BYTE: Any = ctypes.c_char * 1


def array(name: str, values: np.ndarray) -> Array:
    """Describe an array. Raises ValueError unless it is contiguous; the library refuses a wrong dtype or shape."""
    if not isinstance(values, np.ndarray) or not values.flags.c_contiguous or values.ndim > MOST_DIMENSIONS:
        raise ValueError(f"tensor {name} is not a contiguous array in this machine's memory")
    return Array(values.ctypes.data, values.shape, values.ndim, _DTYPES.get(values.dtype, 0))


def in_place(name: str, values: np.ndarray) -> Array:
    """Describe an array of any shape and dtype that is written to. Raises ValueError unless it is contiguous and writable."""
    described = array(name, values)
    if not values.flags.writeable:
        raise ValueError(f"tensor {name} is read-only")
    return described


def memory(values: np.ndarray) -> Any:
    """Return the memory of a writable contiguous array, of any shape and dtype, as an argument.

    Numpy takes twice as long to tell its address.
    """
    return _BYTE.from_buffer(values)


def pointers(arrays: Sequence[Array]) -> Any:
    """Return an array of pointers to described arrays, as the scan's functions take them."""
    return (ctypes.POINTER(Array) * len(arrays))(*map(ctypes.pointer, arrays))


def in_range(name: str, number: object, low: int, high: int) -> int:
    """Return an integer for the library, since ctypes cuts what does not fit. Raises ValueError, TypeError if it is none."""
    value = number.__index__() if hasattr(number, "__index__") else None
    if value is None:
        raise TypeError(f"{name} must be an integer")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}")
    return value
