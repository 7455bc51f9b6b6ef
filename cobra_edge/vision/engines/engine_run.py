"""Run images through an open engine: pixels are copied to the GPU, embeddings are copied back or left in a decoder's memory.

An execution context runs one image at a time. If its work is still pending on another stream, the next image and `close` wait
for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import MachineError
from .device_buffers import DeviceBuffer, Stream


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class EngineRun:
    """The execution context of a TensorRT or TensorRT for RTX engine, with device memory for its input and its output."""

    def __init__(self, context: Any, taken: Tensor, given: Tensor, failed: Callable[[str], MachineError]) -> None:
        """Allocate device memory and set the engine's tensor addresses.

        Args:
            context: the library's execution context; this object becomes its only owner.
            taken: the input, an image.
            given: the output, (1, n_visual_tokens, d_model) float32.
            failed: makes the error for an operation that failed, with the library's message.

        Raises:
            MachineError: too little device memory, or the engine rejects the addresses.
        """
        self._context, self._taken, self._given, self._failed = context, taken, given, failed
        self._under_way: tuple[Stream, np.ndarray] | None = None  # and the image being copied
        with ExitStack() as opened:
            self._stream = opened.enter_context(closing(Stream()))
            self._input = opened.enter_context(closing(DeviceBuffer(taken.shape, taken.dtype)))
            self._output = opened.enter_context(closing(DeviceBuffer(given.shape, given.dtype)))
            self._place(taken, self._input.address)
            self._place(given, self._output.address)
            self._buffers_and_stream = opened.pop_all()

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """See `VisionRunner.embed`. Raises MachineError if the GPU fails, ValueError for pixels of another shape or dtype."""
        embeddings = np.empty(self._output.shape, self._output.dtype)
        self._enqueue(pixels, self._output.address, self._stream)
        self._output.copy_out(embeddings, self._stream)
        self.finish()
        return embeddings[0]

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """See `GpuVision.embed_into`: the work is only enqueued. Raises what `embed` raises."""
        self._enqueue(pixels, address, Stream(stream))

    def finish(self) -> None:
        """Wait for pending work. Raises MachineError if any of it failed."""
        left, self._under_way = self._under_way, None
        if left is not None:
            left[0].synchronize()

    def close(self) -> None:
        """Free context, memory and stream; a second call does nothing. Raises MachineError if pending work failed."""
        try:
            self.finish()
        finally:
            self._context = None
            self._buffers_and_stream.close()

    def _enqueue(self, pixels: np.ndarray, address: int, stream: Stream) -> None:
        self.finish()
        pixels = np.ascontiguousarray(pixels)
        self._place(self._given, address)
        self._input.copy_in(pixels, stream)
        self._under_way = stream, pixels
        if not self._context.execute_async_v3(stream.handle):
            raise self._failed("running the engine")

    def _place(self, tensor: Tensor, address: int) -> None:
        if not self._context.set_tensor_address(tensor.name, address):
            raise self._failed(f"setting the address of {tensor.name}")
