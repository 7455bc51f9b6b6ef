"""The GPU that a decoder runs on: the first one. Its driver, its compute capability, its memory, its compiled kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from functools import cache, cached_property
from typing import Any

from ...environment.available_memory import meminfo_bytes
from ...environment.nvidia_driver import why_no_driver
from ...environment.requirements import install_hint
from ...errors import MachineError
from .calls import NO_DEVICE, CudaError, call, driver
from .functions import load_module
from .library import why_no_kernels

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # tensor cores for float16, copies ahead, dp4a; what the kernels are compiled for
LEAST_CUDA = (12, 0)  # whose drivers load what is compiled by CUDA 12.6
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR, _MOST_SHARED = 16, 18, 75, 76, 97  # CUdevice_attribute
_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
_UNASKED_SHARED_BYTES = 48 << 10


def why_no_gpu() -> str | None:
    """Return why the CUDA decoder can use no GPU here, with what is needed; None where it can."""
    reason = why_no_driver()
    if reason is not None:
        return reason
    try:
        if importlib.util.find_spec("cuda.bindings") is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:
        return f"cuda-bindings is not installed ({install_hint('cuda')}; on a Jetson [jetpack6] or [jetpack7])"
    try:
        return why_no_kernels() or _why_too_old() or _why_unusable(first_gpu())
    except CudaError as error:
        if error.code != NO_DEVICE:
            return str(error)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return f"there is a driver, but it sees no GPU{hint}; nvidia-smi says what it sees"
    except MachineError as error:
        return str(error)


def _why_too_old() -> str | None:
    version = int(call("asking for the driver's version", "cuDriverGetVersion"))
    known = version // 1000, version % 1000 // 10
    if known >= LEAST_CUDA:
        return None
    return (
        f"the NVIDIA driver is too old: it knows CUDA {known[0]}.{known[1]}, {LEAST_CUDA[0]}.{LEAST_CUDA[1]} or later is "
        "needed; update the driver"
    )


def _why_unusable(gpu: Gpu) -> str | None:
    if gpu.capability >= LEAST_CAPABILITY:
        return None
    return (
        f"{gpu.title} has too low a compute capability, {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later is needed "
        "(Ampere: A100, RTX 30, Orin)"
    )


class Gpu:
    """One GPU, and this process's share of it, which lasts as long as the process.

    Attributes:
        name: what a person calls it.
        capability: compute capability, such as (8, 7).
        multiprocessors: how many it has.
        integrated: whether its memory is the host's, as on a Jetson.
        most_shared_bytes: shared memory that a block may ask for.
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Open it. Raises CudaError where there is none."""
        doing = "looking for a GPU"
        call(doing, "cuInit", 0)
        device = call(doing, "cuDeviceGet", ordinal)
        self.name = call(doing, "cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace")
        attributes = driver().CUdevice_attribute
        of = {
            n: int(call(doing, "cuDeviceGetAttribute", attributes(n), device))
            for n in (_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR, _MOST_SHARED)
        }
        self.capability = of[_MAJOR], of[_MINOR]
        self.multiprocessors, self.integrated, self.most_shared_bytes = (
            of[_MULTIPROCESSORS],
            bool(of[_INTEGRATED]),
            of[_MOST_SHARED],
        )
        self._context = call("opening the GPU", "cuDevicePrimaryCtxRetain", device)
        self._functions: dict[str, Any] = {}
        self._allowed: dict[str, int] = {}
        self._idle_streams: list[Any] = []
        self._lock = threading.RLock()  # the garbage collector may leave a stream while it is held

    @property
    def title(self) -> str:
        """What a person calls it, with its compute capability."""
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"

    def enter(self) -> None:
        """Have this thread's calls go to this GPU; before any other."""
        call("entering the GPU", "cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Return free and total bytes. Where memory is the host's, what the page cache would give back is free too."""
        self.enter()
        free, total = (int(n) for n in call("asking the GPU for its memory", "cuMemGetInfo"))
        if self.integrated:
            free = min(total, max(free, meminfo_bytes("MemAvailable") or 0))
        return free, total

    @cached_property
    def _module(self) -> Any:
        """The compiled kernels; loading them takes memory, so it comes before weights."""
        self.enter()
        return load_module(self.capability, title=self.name, integrated=self.integrated)

    def load(self) -> None:
        """Load the compiled kernels, where that was not done. Raises MachineError where the driver takes none of them."""
        _ = self._module

    def function(self, name: str, shared_bytes: int = 0) -> Any:
        """Return a kernel that may use so much shared memory. Raises MachineError where this installation's kernels lack it."""
        with self._lock:
            if name not in self._functions:
                self._functions[name] = call(
                    f"looking for the kernel {name}", "cuModuleGetFunction", self._module, name.encode()
                )
            function = self._functions[name]
            if shared_bytes > self._allowed.get(name, _UNASKED_SHARED_BYTES):
                attribute = driver().CUfunction_attribute(_DYNAMIC_SHARED_BYTES)
                call(
                    f"asking for {shared_bytes} bytes of shared memory for {name}",
                    "cuFuncSetAttribute",
                    function,
                    attribute,
                    shared_bytes,
                )
                self._allowed[name] = shared_bytes
            return function

    def take_stream(self) -> Any:
        """Return a stream that nobody uses; it lasts as long as the process."""
        with self._lock:
            if self._idle_streams:
                return self._idle_streams.pop()
        self.enter()
        return call("making a stream", "cuStreamCreate", 1)  # it does not wait for the default one

    def leave_stream(self, stream: Any) -> None:
        """Let the next one have a stream."""
        with self._lock:
            self._idle_streams.append(stream)


@cache
def first_gpu() -> Gpu:
    """Return the first GPU, opened when it is first asked for. Raises CudaError where there is none."""
    return Gpu()
