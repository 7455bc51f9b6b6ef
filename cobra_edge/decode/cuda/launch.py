"""A kernel's launch: put on a stream, or into the graph that a stream captures."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import MachineError
from .calls import call, driver
from .device import Gpu


class Address(int):
    """A place in the GPU's memory, as a kernel's argument; a plain int is a C int there."""


Argument = Address | int | float | None
Grid = tuple[int, int, int]


class Queue:
    """Where launches go: a GPU's stream.

    Attributes:
        lost: whether the stream is not to be used any more: a capture on it could not be ended.
    """

    def __init__(self, gpu: Gpu, stream: Any) -> None:
        """Take a stream of that GPU."""
        self.gpu, self.stream, self.lost = gpu, stream, False

    def leave(self) -> None:
        """Let the next one have the stream."""
        if not self.lost:
            self.gpu.leave_stream(self.stream)

    def launch(self, name: str, grid: Grid, threads: int, *arguments: Argument, shared_bytes: int = 0) -> None:
        """Enqueue a kernel.

        Args:
            name: of the kernel.
            grid: blocks.
            threads: of a block.
            arguments: in order; None is a null pointer, a float a C float.
            shared_bytes: dynamic shared memory of a block.
        """
        function = self.gpu.function(name, shared_bytes)
        cells = [_cell(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
        # The driver copies the arguments before it returns.
        call(
            f"launching {name}", "cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, self.stream,
            ctypes.addressof(pointers), 0,
        )  # fmt: skip

    def wait(self, doing: str) -> None:
        """Wait until all that was enqueued is done. Raises CudaError where some of it failed."""
        call(doing, "cuStreamSynchronize", self.stream)

    def capture(self, run: Callable[[], None]) -> Graph:
        """Return what `run` enqueues as one CUDA graph; nothing runs now. Raises MachineError where some of it is refused."""
        bindings = driver()
        mode = bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # others may go on working
        call("capturing a graph", "cuStreamBeginCapture", self.stream, mode)
        try:
            run()
        except BaseException:
            with suppress(MachineError):
                call("giving a graph back", "cuGraphDestroy", self._end_capture())
            raise
        graph = self._end_capture()
        try:
            executable = call("instantiating a graph", "cuGraphInstantiate", graph, 0)
        finally:
            with suppress(MachineError):
                call("giving a graph back", "cuGraphDestroy", graph)
        return Graph(self, executable)

    def _end_capture(self) -> Any:
        self.lost = True
        graph = call("capturing a graph", "cuStreamEndCapture", self.stream)
        self.lost = False
        return graph


class Graph:
    """Launches that are enqueued all at once; given back when nobody refers to them any more."""

    def __init__(self, queue: Queue, executable: Any) -> None:
        """Take an executable graph."""
        self._queue, self._executable = queue, executable
        weakref.finalize(self, _give_back, queue.gpu, executable).atexit = False

    def launch(self) -> None:
        """Enqueue it where it was captured."""
        call("launching a graph", "cuGraphLaunch", self._executable, self._queue.stream)


def _give_back(gpu: Gpu, executable: Any) -> None:
    with suppress(MachineError):
        gpu.enter()
    with suppress(MachineError):
        call("giving a graph back", "cuGraphExecDestroy", executable)


def _cell(argument: Argument) -> Any:
    if argument is None or isinstance(argument, Address):
        return ctypes.c_uint64(argument or 0)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def blocks_of(n: int, size: int) -> int:
    """Return how many blocks of a size n takes."""
    return -(-n // size)
