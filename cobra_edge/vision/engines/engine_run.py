"""Images through an open engine: from this process to the GPU, and embeddings back, or to where a decoder reads them.

An execution context runs one image at a time. Where its work is left on somebody's stream, the next image waits until it is
done, and so does closing; usually it has been for long.
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
    """The execution context of an engine of TensorRT, or of TensorRT for RTX, with memory for its one input and one output."""

    def __init__(self, context: Any, taken: Tensor, given: Tensor, failed: Callable[[str], MachineError]) -> None:
        """Allocate memory on the GPU, and tell the engine where it is.

        Args:
            context: of the library; it is kept here alone.
            taken: the image.
            given: (1, n_visual_tokens, d_model) float32.
            failed: makes an error of what was being done, with the library's own words.

        Raises:
            MachineError: no room on the GPU, or the engine takes no such memory.
        """
        self._context, self._taken, self._given, self._failed = context, taken, given, failed
        self._under_way: tuple[Stream, np.ndarray] | None = None  # and the image that it copies
        with ExitStack() as opened:
            self._stream = opened.enter_context(closing(Stream()))
            self._input = opened.enter_context(closing(DeviceBuffer(taken.shape, taken.dtype)))
            self._output = opened.enter_context(closing(DeviceBuffer(given.shape, given.dtype)))
            self._place(taken, self._input.address)
            self._place(given, self._output.address)
            self._buffers_and_stream = opened.pop_all()

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """See `VisionRunner.embed`. Raises MachineError where the GPU fails, ValueError for pixels of another form."""
        embeddings = np.empty(self._output.shape, self._output.dtype)
        self._enqueue(pixels, self._output.address, self._stream)
        self._output.copy_out(embeddings, self._stream)
        self.finish()
        return embeddings[0]

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """See `GpuVision.embed_into`: the work is left on the stream. Raises as `embed` does."""
        self._enqueue(pixels, address, Stream(stream))

    def finish(self) -> None:
        """Wait for what was left on a stream. Raises MachineError where any of it failed."""
        left, self._under_way = self._under_way, None
        if left is not None:
            left[0].synchronise()

    def close(self) -> None:
        """Give context, memory and stream back; again is nothing. Raises MachineError where what was left under way failed."""
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
            raise self._failed(f"giving {tensor.name} its place")
