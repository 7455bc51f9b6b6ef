"""A GPU to measure: time, memory and limits.

Everything here also runs on torch's "cpu" device, without memory counters and synchronisation, so that it can be tested
without a GPU.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch

from ..errors import MachineError
from ..model.torch_device import why_no_torch_gpu

_READ_BYTES = 2 << 30  # far beyond any cache
_READ_PART = 8  # of a small GPU's memory at most this part
_REPEATS = 8
_PRODUCT_SIDE = 8192
_WORDS_OF_MAKERS = ("nvidia", "geforce", "graphics", "gpu")


class Gpu:
    """A CUDA device, or torch's "cpu" device in tests."""

    def __init__(self, device: torch.device) -> None:
        """Set the device."""
        self.device, self._on_gpu = device, device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if self._on_gpu else "cpu"

    def facts(self) -> dict[str, Any]:
        """Return name, compute capability, memory, multiprocessors and versions, see `GpuFacts`."""
        found: dict[str, Any] = {"name": self.name, "torch": str(torch.__version__), "cuda": torch.version.cuda}
        if self._on_gpu:
            it = torch.cuda.get_device_properties(self.device)
            found |= {
                "compute_capability": f"{it.major}.{it.minor}",
                "memory_gb": round(it.total_memory / 1e9, 1),
                "multiprocessors": it.multi_processor_count,
            }
        return found

    def synchronise(self) -> None:
        """Wait until the GPU is idle."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the wall time of some work, from an idle GPU to an idle GPU."""
        self.synchronise()
        began = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - began

    def allocated_bytes(self) -> int | None:
        """Return the GPU memory that torch has allocated, in bytes; None if it is not counted."""
        return torch.cuda.memory_allocated(self.device) if self._on_gpu else None

    def forget_peak(self) -> None:
        """Reset the peak of allocated memory."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Return the peak of allocated memory since `forget_peak`, in bytes; None if it is not counted."""
        return torch.cuda.max_memory_allocated(self.device) if self._on_gpu else None

    def free_bytes(self) -> int | None:
        """Return the free GPU memory in bytes; None if it is not known."""
        if not self._on_gpu:
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def _work_seconds(self, work: Callable[[], object]) -> float:
        """Return the GPU time of one repetition, by CUDA events: without the host's share."""
        work()
        if not self._on_gpu:
            return self.seconds(lambda: [work() for _ in range(_REPEATS)]) / _REPEATS
        event: Any = torch.cuda.Event  # torch leaves it untyped
        began, ended = event(enable_timing=True), event(enable_timing=True)
        began.record()
        for _ in range(_REPEATS):
            work()
        ended.record()
        ended.synchronize()
        milliseconds: float = began.elapsed_time(ended)
        return milliseconds / 1e3 / _REPEATS


class GpuLimits:
    """The limits of a GPU, measured in alternation with the runners."""

    def __init__(self, gpu: Gpu) -> None:
        """Allocate the memory to read and two matrices to multiply."""
        total = torch.cuda.get_device_properties(gpu.device).total_memory if gpu.device.type == "cuda" else 1 << 62
        words = min(_READ_BYTES, total // _READ_PART) // 8  # two halves: one is copied to the other
        self._gpu = gpu
        self._words = torch.ones(2, words, dtype=torch.float32, device=gpu.device)
        self._factors = torch.randn(2, _PRODUCT_SIDE, _PRODUCT_SIDE, device=gpu.device).to(torch.float16)
        self._product = torch.empty(_PRODUCT_SIDE, _PRODUCT_SIDE, dtype=torch.float16, device=gpu.device)

    def read_bandwidth(self) -> float:
        """Return the memory bandwidth in bytes per second: the better of a sum over it, and of a copy within it.

        Raises:
            MachineError: the values read are not those written.
        """
        if abs(float(self._words.mean()) - 1) > 1e-3:  # a float32 sum of so many ones is not exact
            raise MachineError("values read from the GPU's memory differ from those written; test this GPU")
        read = self._gpu._work_seconds(lambda: self._words.sum())
        copied = self._gpu._work_seconds(lambda: self._words[1].copy_(self._words[0]))
        return self._words.nbytes / min(read, copied)

    def peak_products(self) -> float:
        """Return the multiply-accumulates per second of a large float16 matmul."""
        took = self._gpu._work_seconds(lambda: torch.mm(self._factors[0], self._factors[1], out=self._product))
        return float(_PRODUCT_SIDE**3 / took)


def gpu_here() -> Gpu:
    """Return this machine's GPU. Raises MachineError, with the reason, if there is none."""
    reason = why_no_torch_gpu()
    if reason is not None:
        raise MachineError(f"a GPU cannot be measured: {reason}; or use --device cpu")
    return Gpu(torch.device("cuda", 0))  # the one that decoders run on


def short_name(gpu_name: str) -> str:
    """Return a GPU's name for a file name: "rtx-4090" for "NVIDIA GeForce RTX 4090"."""
    words = [w for w in re.split(r"[^a-z0-9]+", gpu_name.lower()) if w and w not in _WORDS_OF_MAKERS]
    return "-".join(words) or "gpu"


def captured(step: Callable[[], object], gpu: Gpu) -> Callable[[], object]:
    """Return the replay of a step captured in a CUDA graph; without a GPU the step itself."""
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
