"""This machine's GPU in the place of the emulated one: the same cases, by the real driver and the compiled kernels.

`COBRA_REAL_GPU=1` runs tests of kernels and of the decoder there; `COBRA_REAL_GPU=compute_80` takes that image of kernels.xz.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

import numpy as np
import pytest

from cobra_edge.decode.cuda import functions
from cobra_edge.decode.cuda.calls import call
from cobra_edge.decode.cuda.device import Gpu, first_gpu
from cobra_edge.decode.cuda.library import KernelLibrary, read_kernels
from cobra_edge.errors import MachineError

from .kernels import KernelError, cell

VARIABLE = "COBRA_REAL_GPU"
_GUARD = 256  # bytes on both sides of an array that no kernel may write to
_UNTOUCHED = 0xA5


def is_wanted() -> bool:
    """Whether tests are to run on this machine's GPU."""
    return bool(os.environ.get(VARIABLE))


def _chosen() -> KernelLibrary:
    library, name = read_kernels(), os.environ[VARIABLE]
    if name == "1":
        return library
    images = tuple(i for i in library.images if str(i) == name)
    if not images:
        raise MachineError(f"{VARIABLE}={name}: kernels.xz has {', '.join(map(str, library.images))}; name one of them, or 1")
    return KernelLibrary(images, library.sources)


@cache
def real_gpu() -> Gpu:
    """Return this machine's GPU with the kernels loaded that the variable names."""
    gpu = first_gpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "read_kernels", _chosen)
        gpu.load()
    return gpu


class RealDriver:
    """What tests ask of the fake driver, as far as a real one can do it; a test that needs more is skipped."""

    def seed(self, seed: int) -> None:
        """Do nothing: a GPU runs threads in an order of its own."""

    def __getattr__(self, name: str) -> NoReturn:
        """Skip the test."""
        pytest.skip(f"only the fake driver has {name}")


class RealKernels:
    """Launches one kernel by its name, see `kernels.Emulator`; what lies around its arrays is checked."""

    def __init__(self) -> None:
        """Load the kernels."""
        self._gpu = real_gpu()
        self._stream = self._gpu.take_stream()
        self._kept: list[_Array] = []

    def run(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: np.ndarray | int | float | None,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Run a kernel to its end, see `Emulator.run`; `seed` is the GPU's affair."""
        self._gpu.enter()
        there = {i: _Array(a, name) for i, a in enumerate(arguments) if isinstance(a, np.ndarray)}
        try:
            cells = [cell(np.uint64(there[i].address) if i in there else a) for i, a in enumerate(arguments)]
            pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
            grids, blocks = ((*((n,) if isinstance(n, int) else tuple(n)), 1, 1)[:3] for n in (grid, block))
            call("copying arrays", "cuCtxSynchronize")  # the stream waits for no copy
            call(
                f"launching {name}", "cuLaunchKernel", self._gpu.function(name, shared), *grids, *blocks, shared, self._stream,
                ctypes.addressof(pointers), 0,
            )  # fmt: skip
            call(f"running {name}", "cuCtxSynchronize")
            for array in there.values():
                array.fetch_back()
        finally:
            for array in there.values():
                array.free()

    def address_of(self, array: np.ndarray) -> int:
        """Copy an array to the GPU for the life of this object; return where it lies."""
        self._gpu.enter()
        self._kept.append(_Array(array, "address_of"))
        return self._kept[-1].address

    def fetch(self, address: int, like: np.ndarray) -> np.ndarray:
        """Return a copy of what lies at an address, of the shape and dtype of `like`."""
        found = np.empty_like(like)
        call("copying to the host", "cuMemcpyDtoH", found.ctypes.data, address, found.nbytes)
        return found


class _Array:
    """A copy of an array on the GPU, between guards."""

    def __init__(self, array: np.ndarray, kernel: str) -> None:
        assert array.flags.c_contiguous
        self._array, self._kernel, self._nbytes = array, kernel, array.nbytes
        whole = np.full(2 * _GUARD + max(array.nbytes, 1), _UNTOUCHED, np.uint8)
        whole[_GUARD : _GUARD + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        self._block = int(call("allocating", "cuMemAlloc", whole.nbytes))
        call("copying an array", "cuMemcpyHtoD", self._block, whole.ctypes.data, whole.nbytes)
        self._whole = whole
        self.address = self._block + _GUARD

    def fetch_back(self) -> None:
        """Copy it back where it may be written to. Raises KernelError where something around it was."""
        found = np.empty_like(self._whole)
        call("copying an array", "cuMemcpyDtoH", found.ctypes.data, self._block, found.nbytes)
        inner = found[_GUARD : _GUARD + self._nbytes]
        if (found[:_GUARD] != _UNTOUCHED).any() or (found[_GUARD + self._nbytes :] != _UNTOUCHED).any():
            raise KernelError(f"{self._kernel} wrote outside of an array of {self._nbytes} bytes")
        if self._array.flags.writeable:
            self._array[...] = inner.view(self._array.dtype).reshape(self._array.shape)

    def free(self) -> None:
        """Give its memory back."""
        call("giving memory back", "cuMemFree", self._block)
