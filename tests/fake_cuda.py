"""A fake of the calls of cuda.bindings.runtime that the package uses. It is not CUDA.

Device memory is host memory filled with NaN. A stream does nothing until it is synchronized: reads before that return the old
content, so that a missing synchronization shows. Every address and handle is checked. Return values have NVIDIA's form, an
error code followed by values.

It can verify that memory and streams are allocated, used in order and freed. It cannot verify anything about a driver, a GPU,
real asynchrony, pinned memory or speed.

`FakeCuda` is a GPU controlled by a test. `ENVIRONMENT` is described by FAKE_GPU, so that child processes of a test have the
same one: "name;compute capability;total bytes;free bytes;multiprocessors;integrated (0 or 1)", "" for no GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

ORIN_NANO = "Orin;8.7;7990000000;6000000000;8;1"


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaDeviceAttr(IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrIntegrated = 18


OK, INVALID = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue
TEXTS = {
    cudaError_t.cudaSuccess: b"no error",
    cudaError_t.cudaErrorInvalidValue: b"invalid argument",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
}


class FakeCuda:
    """One GPU, or none, with its driver; addresses are those of real arrays."""

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = cudaError_t, cudaMemcpyKind, cudaDeviceAttr

    def __init__(self, gpu: str = "GeForce Test 3060;8.6;1073741824;1073741824;28;0") -> None:
        self.gpu, self.driver = gpu, 13000
        self.memory: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}

    def facts(self) -> list[str]:
        """Return the fields of FAKE_GPU; [""] for no GPU."""
        return self.gpu.split(";")

    def change(self, **parts: str) -> None:
        """Change the GPU's name, capability or free memory."""
        facts = self.facts()
        for part, text in parts.items():
            facts[("name", "capability", "total", "free").index(part)] = text
        self.gpu = ";".join(facts)

    def _free(self) -> int:
        return int(self.facts()[3]) - sum(a.nbytes for a in self.memory.values())

    def cudaGetErrorString(self, error):
        return OK, TEXTS[error]

    def cudaDriverGetVersion(self):
        return OK, self.driver

    def cudaGetDeviceCount(self):
        return (OK, 1) if self.facts() != [""] else (cudaError_t.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(self, device):
        assert device == 0
        name, capability, *_ = self.facts()
        major, minor = capability.split(".")
        return OK, SimpleNamespace(name=name.encode(), major=int(major), minor=int(minor))

    def cudaDeviceGetAttribute(self, attribute, device):
        assert device == 0
        return OK, int(self.facts()[4 if attribute is cudaDeviceAttr.cudaDevAttrMultiProcessorCount else 5])

    def cudaMemGetInfo(self):
        return OK, self._free(), int(self.facts()[2])

    def cudaMalloc(self, size):
        if size > self._free():
            return cudaError_t.cudaErrorMemoryAllocation, None
        block = np.full(size, 0xFF, np.uint8)  # NaN as float32
        self.memory[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFree(self, address):
        return (OK,) if self.memory.pop(address, None) is not None else (INVALID,)

    def cudaStreamCreate(self):
        handle = max(self.streams, default=0) + 1
        self.streams[handle] = []
        return OK, handle

    def cudaStreamDestroy(self, stream):
        return (OK,) if self.streams.pop(stream, None) is not None else (INVALID,)

    def cudaStreamSynchronize(self, stream):
        if stream not in self.streams:
            return (INVALID,)
        while self.streams[stream]:
            self.streams[stream].pop(0)()
        return (OK,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        device = to if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else source
        if device not in self.memory or size > self.memory[device].nbytes or stream not in self.streams:
            return (INVALID,)
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size) and None)
        return (OK,)


class _Environment(FakeCuda):
    """The GPU of FAKE_GPU, read again at each call."""

    def facts(self) -> list[str]:
        return os.environ.get("FAKE_GPU", ORIN_NANO).split(";")


ENVIRONMENT = _Environment()
memory, streams = ENVIRONMENT.memory, ENVIRONMENT.streams


def install(module: dict[str, object]) -> None:
    """Fill the namespace of a module `cuda.bindings.runtime` with ENVIRONMENT's calls."""
    module |= {name: getattr(ENVIRONMENT, name) for name in dir(ENVIRONMENT) if name.startswith("cuda")}
