"""Launch one kernel on the emulator, by its name: for tests of kernels, which need no decoder around them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .build import KERNELS, KERNELS_ALONE, compiled


class KernelError(Exception):
    """What the emulator found a kernel to do wrong."""


def cell(argument: np.generic | int | float | None) -> ctypes.Array:
    """Return an argument as a launch takes it: None is a null pointer, a Python int a C int, a Python float a C float."""
    if argument is None:
        value = bytes(8)
    elif isinstance(argument, np.generic):
        value = argument.tobytes()
    else:
        value = (np.float32 if isinstance(argument, float) else np.int32)(argument).tobytes()
    return ctypes.create_string_buffer(value, len(value))


class Emulator:
    """The kernels of a directory, compiled one way; see `build.KINDS`.

    The library is opened by its path, apart from any driver: nothing else in the process sees it.
    """

    def __init__(self, kind: str = "checked", kernels: Path = KERNELS) -> None:
        """Compile and open it."""
        self._library = ctypes.CDLL(str(compiled(kind, kernels).with_name(KERNELS_ALONE)))
        self._library.kernel_run.restype = ctypes.c_char_p
        self._library.kernel_allocate.restype = ctypes.c_void_p

    def run(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: np.ndarray | int | float | None,
        shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Run a kernel to its end.

        Args:
            name: of the kernel.
            grid, block: how many blocks, and threads of a block; up to three numbers.
            arguments: an array is copied to the device, 256-byte aligned, and back; a Python int is a C int, a float a C float,
                None a null pointer; other sizes as numpy scalars (np.uint64 for an address).
            shared: bytes of shared memory.
            seed: of the order of threads and blocks.

        Raises:
            KernelError: it did something wrong.
        """
        self._library.fake_seed(ctypes.c_uint64(seed))
        cells: list[ctypes.Array] = []
        there: list[tuple[np.ndarray, int]] = []
        try:
            for argument in arguments:
                if isinstance(argument, np.ndarray):
                    assert argument.flags.c_contiguous
                    address = self._library.kernel_allocate(ctypes.c_size_t(max(argument.nbytes, 1)))
                    ctypes.memmove(address, argument.ctypes.data, argument.nbytes)
                    there.append((argument, address))
                    argument = np.uint64(address)
                cells.append(cell(argument))
            pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
            sizes = (ctypes.c_size_t * len(cells))(*[len(c) for c in cells])
            triple = [(*((n,) if isinstance(n, int) else tuple(n)), 1, 1)[:3] for n in (grid, block)]
            shape = (ctypes.c_uint * 6)(*triple[0], *triple[1])
            wrong = self._library.kernel_run(name.encode(), shape, ctypes.c_size_t(shared), len(cells), pointers, sizes)
            if wrong:
                raise KernelError(wrong.decode())
            for argument, address in there:
                if argument.flags.writeable:
                    ctypes.memmove(argument.ctypes.data, address, argument.nbytes)
        finally:
            for _, address in there:
                self._library.kernel_release(ctypes.c_void_p(address))

    def address_of(self, array: np.ndarray) -> int:
        """Copy an array to the device for good, and return where it lies: for kernels that follow an address."""
        address = self._library.kernel_allocate(ctypes.c_size_t(max(array.nbytes, 1)))
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return int(address)

    def fetch(self, address: int, like: np.ndarray) -> np.ndarray:
        """Return a copy of what lies at an address, of the shape and dtype of `like`."""
        found = np.empty_like(like)
        ctypes.memmove(found.ctypes.data, address, found.nbytes)
        return found
