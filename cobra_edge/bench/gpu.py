"""A GPU to measure, through its driver alone: time, memory and limits. torch is for peers, and for a large matmul's rate."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..decode.cuda.calls import call
from ..decode.cuda.device import first_gpu, why_no_gpu
from ..decode.cuda.memory import DeviceBlock
from ..errors import MachineError
from .machine import version_of

if TYPE_CHECKING:
    import torch

_READ_BYTES = 2 << 30  # far beyond any cache
_READ_PART = 8  # of the free memory at most this part
_REPEATS = 8
_PRODUCT_SIDE = 8192
_WORDS_OF_MAKERS = ("nvidia", "geforce", "graphics", "gpu")


class Gpu:
    """The GPU that decoders run on.

    Attributes:
        name: of the GPU.
        stream: for what is measured here.
    """

    def __init__(self) -> None:
        """Open it. Raises MachineError, with the reason, if there is none."""
        reason = why_no_gpu()
        if reason is not None:
            raise MachineError(f"a GPU cannot be measured: {reason}; or use --device cpu")
        self._gpu = first_gpu()
        self.name, self.stream = self._gpu.name, self._gpu.take_stream()

    @property
    def device(self) -> torch.device:
        """The same GPU for torch, which peers use."""
        import torch

        return torch.device("cuda", 0)

    def facts(self) -> dict[str, Any]:
        """Return name, compute capability, memory, multiprocessors and versions, see `GpuFacts`."""
        version = int(call("asking for the driver's version", "cuDriverGetVersion"))
        return {
            "name": self.name,
            "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
            "bindings": version_of("cuda-bindings"),
            "torch": version_of("torch"),
            "compute_capability": "{}.{}".format(*self._gpu.capability),
            "memory_gb": round(self._gpu.memory()[1] / 1e9, 1),
            "multiprocessors": self._gpu.multiprocessors,
        }

    def synchronise(self) -> None:
        """Wait until the GPU is idle."""
        self._gpu.enter()
        call("waiting for the GPU", "cuCtxSynchronize")

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the wall time of some work, from an idle GPU to an idle GPU."""
        self.synchronise()
        began = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - began

    def free_bytes(self, *, keep: bool = False) -> int:
        """Return the free GPU memory in bytes; torch gives back what it only keeps for later, unless it is to keep it."""
        torch = sys.modules.get("torch")
        if torch is not None and not keep and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return self._gpu.memory()[0]

    def block(self, nbytes: int, purpose: str) -> DeviceBlock:
        """Allocate memory."""
        return DeviceBlock(self._gpu, nbytes, purpose)


class GpuMemory:
    """Memory of a GPU, to measure its bandwidth."""

    def __init__(self, gpu: Gpu) -> None:
        """Allocate the memory to copy."""
        self._half = min(_READ_BYTES, gpu.free_bytes() // _READ_PART) // 512 * 256  # one half is copied to the other
        self._gpu, self._block = gpu, gpu.block(2 * self._half, "measuring the bandwidth")
        call("filling memory", "cuMemsetD8Async", self._block.address, 0x5A, self._half, gpu.stream)

    def read_bandwidth(self) -> float:
        """Return the memory bandwidth in bytes per second of a copy within it: bytes read and written.

        Raises:
            MachineError: the values read are not those written.
        """
        first, second, last = self._block.address, self._block.address + self._half, np.zeros(256, np.uint8)
        copy = ("copying memory", "cuMemcpyDtoDAsync", second, first, self._half, self._gpu.stream)
        call(*copy)
        took = self._gpu.seconds(lambda: [call(*copy) for _ in range(_REPEATS)]) / _REPEATS
        call("reading memory", "cuMemcpyDtoH", last.ctypes.data, second + self._half - last.nbytes, last.nbytes)
        if (last != 0x5A).any():
            raise MachineError("values read from the GPU's memory differ from those written; test this GPU")
        return 2 * self._half / took


class GpuLimits:
    """The limits of a GPU, measured in alternation with the runners."""

    def __init__(self, gpu: Gpu) -> None:
        """Allocate the memory to copy, and two matrices to multiply where torch is there."""
        self._gpu, self._memory = gpu, GpuMemory(gpu)
        self._multiply = _large_product(gpu)

    def read_bandwidth(self) -> float:
        """See `GpuMemory.read_bandwidth`."""
        return self._memory.read_bandwidth()

    def peak_products(self) -> float | None:
        """Return the multiply-accumulates per second of a large float16 matmul by torch; None without torch on this GPU."""
        multiply = self._multiply
        if multiply is None:
            return None
        multiply()
        took = self._gpu.seconds(lambda: [multiply() for _ in range(_REPEATS)]) / _REPEATS
        return float(_PRODUCT_SIDE**3 / took)


def _large_product(gpu: Gpu) -> Callable[[], object] | None:
    """Return a product of two random matrices by torch; None where torch cannot use the GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    a, b = torch.randn(2, _PRODUCT_SIDE, _PRODUCT_SIDE, device=gpu.device).to(torch.float16)
    out = torch.empty(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=torch.float16, device=gpu.device)
    return lambda: torch.mm(a, b, out=out)


def gpu_here() -> Gpu:
    """Return this machine's GPU. Raises MachineError, with the reason, if there is none."""
    return Gpu()


def captured(step: Callable[[], object], gpu: Gpu) -> Callable[[], object]:
    """Return the replay of a step of torch's, captured in a CUDA graph; in tests, on torch's "cpu" device, the step itself."""
    import torch

    if gpu.device.type != "cuda":
        return step
    stream: Any = torch.cuda.Stream  # torch leaves it untyped
    aside = stream(gpu.device)
    aside.wait_stream(torch.cuda.current_stream(gpu.device))
    with torch.cuda.stream(aside):  # the first calls of libraries allocate, which a capture does not allow
        for _ in range(2):
            step()
    torch.cuda.current_stream(gpu.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def short_name(gpu_name: str) -> str:
    """Return a GPU's name for a file name: "rtx-4090" for "NVIDIA GeForce RTX 4090"."""
    words = [w for w in re.split(r"[^a-z0-9]+", gpu_name.lower()) if w and w not in _WORDS_OF_MAKERS]
    return "-".join(words) or "gpu"
