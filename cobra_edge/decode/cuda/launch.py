"""A kernel's launch: put on a stream, or into the graph that a stream captures."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import MachineError
from .calls import call, driver, refusal
from .device import Gpu


class Address(int):
    """A place in the GPU's memory, as a kernel's argument; a plain int is a C int there."""


class Slot(Address):
    """An address that is found in the rows of a table: how many bytes behind a row's beginning. See `Queue.repeat`."""


Argument = Address | int | float | None
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: the arguments of `Queue.launch`."""

    name: str
    grid: Grid
    threads: int
    arguments: tuple[Argument, ...]
    shared_bytes: int = 0

    @property
    def slots(self) -> tuple[bool, ...]:
        """Which arguments are slots."""
        return tuple([isinstance(a, Slot) for a in self.arguments])

    def in_row(self, row: np.ndarray) -> Launch:
        """Return the launch of one row of a table, (columns,) uint64: with its addresses in place of slots."""
        found = [Address(row[a // row.itemsize]) if isinstance(a, Slot) else a for a in self.arguments]
        return replace(self, arguments=tuple(found))


class Queue:
    """Where launches go: a GPU's stream.

    Attributes:
        lost: whether the stream is not to be used any more: a capture on it could not be ended.
    """

    def __init__(self, gpu: Gpu, stream: Any) -> None:
        """Take a stream of that GPU."""
        self.gpu, self.stream, self.lost = gpu, stream, False
        self._noted: list[Launch] | None = None

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
        launch = Launch(name, grid, threads, arguments, shared_bytes)
        if self._noted is None:
            self.enqueue(launch)
        else:
            self._noted.append(launch)

    def enqueue(self, launch: Launch) -> None:
        """Enqueue a launch without slots."""
        shape, cells = _shape(self.gpu, launch), [_cell(a) for a in launch.arguments]
        pointers = (ctypes.c_void_p * len(cells))(*[ctypes.addressof(c) for c in cells])
        # The driver copies the arguments before it returns.
        call(f"launching {launch.name}", "cuLaunchKernel", *shape, self.stream, ctypes.addressof(pointers), 0)

    def note(self, run: Callable[[], None]) -> list[Launch]:
        """Return what `run` launches; nothing is enqueued."""
        noted: list[Launch] = []
        self._noted = noted
        try:
            run()
        finally:
            self._noted = None
        return noted

    def repeat(self, kinds: Sequence[Sequence[Launch]], kind_of: Sequence[int], table: np.ndarray) -> None:
        """Enqueue launches for row after row of a table, with that row's addresses in place of slots.

        The same as `enqueue` of `Launch.in_row`, but arguments are laid out once for all rows: a launch then costs the host
        little more than the driver's call.

        Args:
            kinds: of each kind of row its launches.
            kind_of: of each row, an index into `kinds`.
            table: (rows, columns) uint64, contiguous.
        """
        laid_out = _laid_out(self.gpu, kinds, table)
        launch_kernel, stream = driver().cuLaunchKernel, self.stream
        for row, kind in enumerate(kind_of):
            for launch in laid_out[kind]:
                (error,) = launch_kernel(*launch.shape, stream, launch.pointers + launch.row_bytes * row, 0)
                if error:
                    raise refusal(f"launching {launch.name}", error)

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


class _Repeated:
    """A launch whose arguments lie where the driver reads them, for each row of a table.

    Attributes:
        name: of the kernel.
        shape: see `_shape`.
        pointers: where the pointers to the arguments of the first row's launch begin.
        row_bytes: how much further those of the next row do.
    """

    def __init__(self, gpu: Gpu, launch: Launch, table: np.ndarray) -> None:
        self.name, self.shape = launch.name, _shape(gpu, launch)
        self._table, begin = table, table.ctypes.data
        self._cells = [None if isinstance(a, Slot) else _cell(a) for a in launch.arguments]
        cells = list(zip(launch.arguments, self._cells, strict=True))
        first = np.array([begin + int(a or 0) if c is None else ctypes.addressof(c) for a, c in cells], np.uint64)
        steps = np.array([table.strides[0] if c is None else 0 for c in self._cells], np.uint64)
        self._pointers = first + np.arange(len(table), dtype=np.uint64)[:, None] * steps
        self.pointers, self.row_bytes = self._pointers.ctypes.data, self._pointers.strides[0]


def _laid_out(gpu: Gpu, kinds: Sequence[Sequence[Launch]], table: np.ndarray) -> list[list[_Repeated]]:
    """Lay launches out, those that are the same in several kinds once."""
    found: dict[tuple[Launch, tuple[bool, ...]], _Repeated] = {}  # a slot may equal an address as a number
    kept: list[list[_Repeated]] = []
    for launches in kinds:
        keys = [(launch, launch.slots) for launch in launches]
        found.update({key: _Repeated(gpu, key[0], table) for key in keys if key not in found})
        kept.append([found[key] for key in keys])
    return kept


def _shape(gpu: Gpu, launch: Launch) -> tuple[Any, ...]:
    """Return the arguments of cuLaunchKernel that come before the stream."""
    return (gpu.function(launch.name, launch.shared_bytes), *launch.grid, launch.threads, 1, 1, launch.shared_bytes)


def _cell(argument: Argument) -> Any:
    assert not isinstance(argument, Slot), "a slot means something to Queue.repeat alone"
    if argument is None or isinstance(argument, Address):
        return ctypes.c_uint64(argument or 0)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int(argument)


def blocks_of(n: int, size: int) -> int:
    """Return how many blocks of a size n takes."""
    return -(-n // size)
