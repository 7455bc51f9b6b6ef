"""Memory on the GPU and beside it: blocks that are given back when nobody refers to them any more."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from ...errors import MachineError
from .calls import call
from .device import Gpu

ALIGNMENT = 256


class DeviceBlock:
    """Memory on the GPU that belongs to whoever refers to it.

    Attributes:
        address: a multiple of 256.
        nbytes: its size.
    """

    def __init__(self, gpu: Gpu, nbytes: int, purpose: str) -> None:
        """Allocate. Raises CudaError where there is no room."""
        gpu.enter()
        self.nbytes = nbytes
        self.address = int(call(f"allocating {nbytes / 1e6:.1f} MB for {purpose}", "cuMemAlloc", max(nbytes, 1)))
        weakref.finalize(self, _give_back, gpu, "cuMemFree", self.address).atexit = False


def pinned(gpu: Gpu, nbytes: int, purpose: str) -> np.ndarray:
    """Return memory of the host that the GPU copies from and to while the host goes on: (nbytes,) uint8, zeros.

    Raises CudaError where there is no room.
    """
    gpu.enter()
    address = int(call(f"pinning {nbytes / 1e6:.1f} MB for {purpose}", "cuMemHostAlloc", nbytes, 0))
    there = np.asarray(_Pinned(gpu, address, nbytes))
    there[:] = 0
    return there


class _Pinned:
    """Pinned memory as numpy takes it; it is given back when no array looks into it any more."""

    def __init__(self, gpu: Gpu, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}
        weakref.finalize(self, _give_back, gpu, "cuMemFreeHost", address).atexit = False


def _give_back(gpu: Gpu, name: str, address: int) -> None:
    """Free memory; where the GPU has failed it is gone anyway, and nobody waits for an answer."""
    with suppress(MachineError):
        gpu.enter()
    with suppress(MachineError):
        call("giving memory back", name, address)


class Layout:
    """Where arrays lie in one block, each at a multiple of 256 bytes.

    Attributes:
        nbytes: of the block.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.nbytes = 0

    def add(self, nbytes: int) -> int:
        """Return the offset of the next array."""
        offset = self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offset


def copy_in(address: int, array: np.ndarray, stream: Any, doing: str) -> None:
    """Put a contiguous array onto a stream's way to the GPU; it may be changed when this returns."""
    assert array.flags.c_contiguous
    if array.nbytes:
        call(doing, "cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)


def copy_out(array: np.ndarray, address: int, stream: Any, doing: str) -> None:
    """Fill a contiguous array from the GPU; it may be read once the stream is done."""
    assert array.flags.c_contiguous
    if array.nbytes:
        call(doing, "cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)


def copy_across(to: int, source: int, nbytes: int, stream: Any, doing: str) -> None:
    """Copy on the GPU."""
    call(doing, "cuMemcpyDtoDAsync", to, source, nbytes, stream)


def slices(nbytes: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of pieces of at most that size."""
    for begin in range(0, nbytes, size):
        yield begin, min(begin + size, nbytes)
