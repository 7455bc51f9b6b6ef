"""A fake of the few calls of cuda.bindings.runtime that the package makes. It is not CUDA.

Device memory is host memory that begins as NaNs. A stream does nothing until it is synchronised: what is read before that is
what was there before, so a forgotten synchronisation shows. Every address and handle is checked. Return values have NVIDIA's
form, an error code and then values.

What it proves: that memory and streams are made, used in order and given back. What it cannot: anything about a driver, a card,
real asynchrony, pinned memory or speed.

The card is described by the environment, so that processes which a test starts have the same one:
FAKE_CARD = "name;compute capability;total bytes;free bytes;multiprocessors;integrated (0 or 1)", FAKE_CARD = "" for no card.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

ORIN_NANO = "Orin;8.7;7990000000;6000000000;8;1"


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrMultiProcessorCount = 16
    cudaDevAttrIntegrated = 18


OK = cudaError_t.cudaSuccess
memory: dict[int, np.ndarray] = {}
streams: dict[int, list[Callable[[], None]]] = {}


def _card() -> list[str]:
    return os.environ.get("FAKE_CARD", ORIN_NANO).split(";")


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return OK, error.name.encode()


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:
    return OK, 12060


def cudaGetDeviceCount() -> tuple[cudaError_t, int]:
    return OK, int(_card() != [""])


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, SimpleNamespace]:
    assert device == 0
    name, capability, *_ = _card()
    major, minor = capability.split(".")
    return OK, SimpleNamespace(name=name.encode(), major=int(major), minor=int(minor))


def cudaDeviceGetAttribute(attribute: cudaDeviceAttr, device: int) -> tuple[cudaError_t, int]:
    assert device == 0
    return OK, int(_card()[4 if attribute is cudaDeviceAttr.cudaDevAttrMultiProcessorCount else 5])


def cudaMemGetInfo() -> tuple[cudaError_t, int, int]:
    return OK, int(_card()[3]), int(_card()[2])


def cudaStreamCreate() -> tuple[cudaError_t, int]:
    handle = max(streams, default=0) + 1
    streams[handle] = []
    return OK, handle


def cudaStreamDestroy(stream: int) -> tuple[cudaError_t]:
    del streams[stream]
    return (OK,)


def cudaStreamSynchronize(stream: int) -> tuple[cudaError_t]:
    if stream not in streams:
        return (cudaError_t.cudaErrorInvalidValue,)
    while streams[stream]:
        streams[stream].pop(0)()
    return (OK,)


def cudaMalloc(size: int) -> tuple[cudaError_t, int]:
    if size > int(_card()[3]):
        return cudaError_t.cudaErrorMemoryAllocation, 0
    block = np.full(size, 0xFF, np.uint8)
    memory[block.ctypes.data] = block
    return OK, block.ctypes.data


def cudaFree(address: int) -> tuple[cudaError_t]:
    del memory[address]
    return (OK,)


def cudaMemcpyAsync(to: int, source: int, size: int, kind: cudaMemcpyKind, stream: int) -> tuple[cudaError_t]:
    device = to if kind is cudaMemcpyKind.cudaMemcpyHostToDevice else source
    if device not in memory or size > memory[device].nbytes or stream not in streams:
        return (cudaError_t.cudaErrorInvalidValue,)
    streams[stream].append(lambda: ctypes.memmove(to, source, size) and None)
    return (OK,)
