"""Memory for a TensorRT build: what it needs, what is free, and how much of it kernels may use as workspace."""

from __future__ import annotations

import importlib

from ...bundle.reader import Bundle
from ...environment.available_memory import available_bytes
from .device_buffers import Gpu, checked

# NVIDIA: host memory holds at least two copies of the weights, the parsed graph's and the engine's. A Jetson shares its memory.
WEIGHT_COPIES = 2
WORKSPACE_LEAST_BYTES = 64 << 20


def graph_bytes(bundle: Bundle) -> int:
    """Return the size of the graph and its external data."""
    return sum(bundle.manifest.files[name].bytes for name in bundle.graph_files)


def shares_memory() -> bool:
    """Return whether the first GPU shares memory with the CPU, as on a Jetson."""
    cuda = importlib.import_module("cuda.bindings.runtime")
    attribute = cuda.cudaDeviceAttr.cudaDevAttrIntegrated
    return bool(checked(cuda.cudaDeviceGetAttribute(attribute, 0), "asking the GPU whether it shares memory"))


def free_bytes(gpu: Gpu) -> int:
    """Return the memory available to a build: the smaller of host and device memory, or the memory that both share.

    On a Jetson only Linux is asked: CUDA counts the page cache as used, although Linux would reclaim it.
    """
    there = available_bytes()
    if there is None:
        return gpu.free_bytes
    return there if shares_memory() else min(there, gpu.free_bytes)


def workspace_bytes(bundle: Bundle, free: int) -> int:
    """Return the workspace limit of a kernel in bytes, during the build and in each run.

    Args:
        bundle: its memory plan says what is left on the target next to the decoder.
        free: bytes available now.
    """
    plan = bundle.manifest.memory_plan
    left = free - WEIGHT_COPIES * graph_bytes(bundle)
    if plan.available_bytes is None:
        return left
    return min(left, plan.available_bytes - plan.total_bytes + plan.working_bytes)


def why_too_little_memory(bundle: Bundle, gpu: Gpu) -> str | None:
    """Return why the free memory is too small to build the engine, with the numbers, or None if it may suffice."""
    weights, free = graph_bytes(bundle), free_bytes(gpu)
    needed = WEIGHT_COPIES * weights + WORKSPACE_LEAST_BYTES
    if free >= needed:
        return None
    return (
        f"building the engine takes at least {needed / 1e9:.2f} GB ({WEIGHT_COPIES} times {weights / 1e9:.2f} of weights, "
        f"{WORKSPACE_LEAST_BYTES / 1e9:.2f} of workspace), {free / 1e9:.2f} GB are free; close other programs, stop the "
        "desktop (sudo init 3), or export with a narrower --vision-precision"
    )
