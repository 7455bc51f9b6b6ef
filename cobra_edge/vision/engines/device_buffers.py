"""Device memory and a stream on the first CUDA GPU, through NVIDIA's cuda-bindings.

Importable without cuda-bindings, which is imported on first use. CUDA errors become MachineError with CUDA's message.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...environment.requirements import install_hint
from ...errors import MachineError

# Of the CUDA that the driver knows.


@dataclass(frozen=True)
class Gpu:
    """The GPU that engines run on: its name, compute capability such as "8.6", and total and free memory in bytes."""

    name: str
    capability: str
    memory_bytes: int
    free_bytes: int


def _install() -> str:
    return f"{install_hint('rtx')}; on a Jetson [jetpack6] or [jetpack7]"


def _cuda() -> Any:
    from cuda.bindings import runtime

    return runtime


def why_no_cuda() -> str | None:
    """Return why no CUDA GPU can be used, or None if one can."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return f"cuda-bindings is not installed ({_install()})"
    try:
        cuda = _cuda()
        if not checked(cuda.cudaDriverGetVersion(), "asking for the driver"):
            return "there is no NVIDIA driver"
        if not checked(cuda.cudaGetDeviceCount(), "looking for a GPU"):
            return "there is no CUDA GPU"
    except MachineError as error:
        return str(error)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries, or symbols that it needs from the driver
        return f"cuda-bindings cannot be used ({error}); install it again: {_install()}"
    return None


def first_gpu() -> Gpu:
    """Return the GPU that new buffers are on. Raises MachineError on a CUDA error."""
    cuda = _cuda()
    properties = checked(cuda.cudaGetDeviceProperties(0), "asking the GPU for its properties")
    free, total = checked(cuda.cudaMemGetInfo(), "asking the GPU for its memory")
    return Gpu(properties.name.decode(errors="replace"), f"{properties.major}.{properties.minor}", total, free)


class Stream:
    """A CUDA stream."""

    def __init__(self, handle: int | None = None) -> None:
        """Create a stream, or borrow one by its handle, which is not destroyed. Raises MachineError on a CUDA error."""
        self._ours = handle is None
        self.handle = int(checked(_cuda().cudaStreamCreate(), "making a stream")) if handle is None else handle

    def synchronize(self) -> None:
        """Wait until all work on the stream is done. Raises MachineError if any of it failed."""
        checked(_cuda().cudaStreamSynchronize(self.handle), "waiting for the GPU")

    def close(self) -> None:
        """Destroy the stream; a second call does nothing."""
        handle, self.handle = self.handle, 0
        if handle and self._ours:
            checked(_cuda().cudaStreamDestroy(handle), "destroying a stream")


class DeviceBuffer:
    """Device memory for one array."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any] | type) -> None:
        """Allocate device memory for an array of this shape and dtype. Raises MachineError if the GPU has too little."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.address = int(checked(_cuda().cudaMalloc(self.nbytes), f"allocating {self.nbytes / 1e6:.1f} MB on the GPU"))

    def copy_in(self, array: np.ndarray, stream: Stream) -> None:
        """Copy a contiguous array of this shape and dtype to the GPU. Do not modify it until the stream is synchronized."""
        self._copy(self.address, array.ctypes.data, array, stream, "cudaMemcpyHostToDevice")

    def copy_out(self, array: np.ndarray, stream: Stream) -> None:
        """Copy from the GPU into a contiguous array of this shape and dtype. Read it after the stream is synchronized."""
        self._copy(array.ctypes.data, self.address, array, stream, "cudaMemcpyDeviceToHost")

    def _copy(self, to: int, source: int, array: np.ndarray, stream: Stream, direction: str) -> None:
        assert self.address, "the buffer was freed"
        if array.shape != self.shape or array.dtype != self.dtype or not array.flags.c_contiguous:
            raise ValueError(f"got {array.dtype} {array.shape}, expected contiguous {self.dtype} {self.shape}")
        cuda = _cuda()
        kind = getattr(cuda.cudaMemcpyKind, direction)
        checked(cuda.cudaMemcpyAsync(to, source, self.nbytes, kind, stream.handle), "copying to or from the GPU")

    def close(self) -> None:
        """Free the memory; a second call does nothing."""
        address, self.address = self.address, 0
        if address:
            checked(_cuda().cudaFree(address), "freeing device memory")


def checked(returned: tuple[Any, ...], doing: str) -> Any:
    """Return the values of a CUDA call after its error code: one value, a tuple of several, or None.

    Raises:
        MachineError: the error code is not success; `doing` begins the message.
    """
    error, *values = returned
    if int(error) != 0:
        _, text = _cuda().cudaGetErrorString(error)
        raise MachineError(f"{doing} failed: {text.decode(errors='replace')} (CUDA error {int(error)})")
    return None if not values else values[0] if len(values) == 1 else tuple(values)
