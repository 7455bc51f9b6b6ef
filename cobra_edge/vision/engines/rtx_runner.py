"""Run an engine of TensorRT for RTX on the first card."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...errors import BundleError, MachineError
from .cache import EngineKey
from .device_buffers import Card, DeviceBuffer, Stream
from .runtime_cache import RuntimeCache

log = logging.getLogger(__name__)


class RtxVision:
    """An opened engine with its buffers on the card."""

    def __init__(self, engine: bytes | bytearray | memoryview, key: EngineKey, bundle: Bundle, card: Card) -> None:
        """Deserialise an engine and compile its kernels, or take them from the runtime cache.

        Raises:
            MachineError: the card or the library refuses it.
            BundleError: its input and output are not those of the bundle.
        """
        import tensorrt_rtx as trt

        self.name = f"TensorRT for RTX {key.version}, {card.name}, {key.precision}"
        self._kernels = RuntimeCache(key, card)
        self._logger = _logger(trt)
        with ExitStack() as opened:
            self._stream = opened.enter_context(closing(Stream()))
            self._open(trt, engine)
            self._input, self._output = self._buffers(trt, bundle, opened)
            self._buffers_and_stream = opened.pop_all()

    def _open(self, trt: Any, engine: bytes | bytearray | memoryview) -> None:
        """Deserialise the engine and compile it for the card."""
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._made(self._runtime.deserialize_cuda_engine(engine), "opening the engine")
        config = self._made(self._engine.create_runtime_config(), "configuring the engine")
        self._compiled = self._made(config.create_runtime_cache(), "making a runtime cache")
        self._kernels.load(self._compiled)
        config.set_runtime_cache(self._compiled)
        self._context = self._made(self._engine.create_execution_context(config), "compiling the engine for the card")
        self._kernels_saved = False

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn what the graph takes, float32 pixels or uint8 pictures, into embeddings (n_visual_tokens, d_model) float32.

        Raises:
            MachineError: the card failed.
        """
        embeddings = np.empty(self._output.shape, np.float32)
        pixels = np.ascontiguousarray(pixels)
        self._input.copy_in(pixels, self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise MachineError(f"{self.name}: running the engine failed: {self._logger.take()}")
        self._output.copy_out(embeddings, self._stream)
        self._stream.synchronise()
        if not self._kernels_saved:  # what is compiled late is compiled by now
            self._kernels.save(self._compiled)
            self._kernels_saved = True
        return embeddings[0]

    def close(self) -> None:
        """Give the card's memory back, the engine's before what it uses."""
        self._context = self._compiled = self._engine = self._runtime = None
        self._buffers_and_stream.close()

    def _made(self, thing: Any, doing: str) -> Any:
        """Return what the library made. Raises MachineError, with its own words, where it made nothing."""
        if thing is None:
            raise MachineError(f"{self.name}: {doing} failed: {self._logger.take()}")
        return thing

    def _buffers(self, trt: Any, bundle: Bundle, opened: ExitStack) -> tuple[DeviceBuffer, DeviceBuffer]:
        """Allocate memory for the one input and the one output, and tell the engine where it is."""
        engine, config = self._engine, bundle.manifest.model
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        taken = np.dtype(bundle.vision_graph.input)
        given = (1, config.n_visual_tokens, config.mamba.d_model)
        shapes = {n: tuple(engine.get_tensor_shape(n)) for n in names}
        dtypes = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
        if (
            len(inputs) != 1
            or len(outputs) != 1
            or dtypes[inputs[0]] != taken
            or (dtypes[outputs[0]], shapes[outputs[0]]) != (np.float32, given)
        ):
            got = ", ".join(f"{n} {dtypes[n]} {list(shapes[n])}" for n in names)
            raise BundleError(
                f"{bundle.directory}: its engine has {got}; expected one input of {taken} and one output of float32 "
                f"{list(given)}; export the bundle again"
            )
        buffers = []
        for name in (inputs[0], outputs[0]):
            buffers.append(opened.enter_context(closing(DeviceBuffer(shapes[name], dtypes[name]))))
            if not self._context.set_tensor_address(name, buffers[-1].address):
                raise MachineError(f"{self.name}: {name} has no place: {self._logger.take()}")
        return buffers[0], buffers[1]


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps the library's errors for the messages of ours; nothing is printed."""

        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                log.info("TensorRT for RTX: %s", message.strip())

        def take(self) -> str:
            """Return what was said last, and forget it."""
            words, self._errors = "; ".join(self._errors[-2:]) or "no reason given", []
            return words

    return Logger()
