"""A decoder's state that lies on the GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ...formats.model_config import MambaConfig
from ..decoder import DecoderState
from .calls import call
from .launch import Queue
from .memory import DeviceBlock, Layout, copy_across, copy_in, copy_out

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class GpuState(DecoderState):
    """A state on a GPU: `conv` and `ssm` are copies in the host's memory, made when they are asked for.

    Attributes:
        conv_address, ssm_address: where they begin: contiguous float32, as in `DecoderState`.
        queue: whose decoder works on it; it is idle between that one's calls.
    """

    def __init__(self, shapes: Shapes, queue: Queue, n_tokens: int = 0) -> None:
        """Allocate a state of these shapes, whatever is in it. Raises CudaError where there is no room."""
        self._shapes, self.queue, self.n_tokens = shapes, queue, n_tokens
        layout, (conv, ssm) = _laid_out(shapes)
        self._block = DeviceBlock(queue.gpu, layout.nbytes, "a state")
        self.conv_address, self.ssm_address = self._block.address + conv, self._block.address + ssm

    @classmethod
    def blank(cls, config: MambaConfig, queue: Queue) -> GpuState:
        """Return the state before the first token."""
        conv, ssm, _ = (t.shape for t in DecoderState.layout(config))
        state = cls((conv, ssm), queue)
        doing = "clearing a state"
        call(doing, "cuMemsetD8Async", state.conv_address, 0, state._block.nbytes, queue.stream)
        queue.wait(doing)
        return state

    @property
    def conv(self) -> np.ndarray:
        """A copy of the convolutions' last inputs."""
        return self._host(self.conv_address, 0)

    @property
    def ssm(self) -> np.ndarray:
        """A copy of the recurrent state."""
        return self._host(self.ssm_address, 1)

    def _host(self, address: int, index: int) -> np.ndarray:
        there = np.empty(self._shapes[index], np.float32)
        self.queue.gpu.enter()
        copy_out(there, address, self.queue.stream, "copying a state to the host")
        self.queue.wait("copying a state to the host")
        return there

    @property
    def shapes(self) -> Shapes:
        """See `DecoderState.shapes`."""
        return self._shapes

    def _require_memory(self) -> None:
        """Nothing to refuse: it is as the decoder made it."""

    @contextmanager
    def in_host_memory(self) -> Iterator[DecoderState]:
        """Give a copy in the host's memory, from which this state is filled when the block ends well."""
        here = self.host()
        yield here
        self.fill(here)

    def copy(self) -> GpuState:
        """Return an independent copy, on the GPU too."""
        other = GpuState(self._shapes, self.queue)
        other.fill(self)
        return other

    def fill(self, state: DecoderState) -> None:
        """Become a copy of a state of the same shapes, on the GPU or in the host's memory."""
        doing, stream = "copying a state", self.queue.stream
        self.queue.gpu.enter()
        if isinstance(state, GpuState):
            copy_across(self.conv_address, state.conv_address, self._block.nbytes, stream, doing)
        else:
            copy_in(self.conv_address, np.ascontiguousarray(state.conv, np.float32), stream, doing)
            copy_in(self.ssm_address, np.ascontiguousarray(state.ssm, np.float32), stream, doing)
        self.queue.wait(doing)
        self.n_tokens = state.n_tokens


def _laid_out(shapes: Shapes) -> tuple[Layout, list[int]]:
    layout = Layout()
    return layout, [layout.add(4 * math.prod(shape)) for shape in shapes]


def state_bytes(config: MambaConfig) -> int:
    """Return what one state takes on a GPU."""
    conv, ssm, _ = (t.shape for t in DecoderState.layout(config))
    return _laid_out((conv, ssm))[0].nbytes


@contextmanager
def on_gpu(state: DecoderState, blank: GpuState) -> Iterator[GpuState]:
    """Give a state as one on the GPU: itself where it is there, else a copy, from which it is filled when the block ends well.

    Args:
        state: of the same model; `blank.shapes` says which shapes.
        blank: a state on the GPU that nobody needs, to take a host's.
    """
    if isinstance(state, GpuState):
        yield state
        return
    blank.fill(state)
    yield blank
    with state.in_host_memory() as here:
        here.conv[:], here.ssm[:], here.n_tokens = blank.conv, blank.ssm, blank.n_tokens
