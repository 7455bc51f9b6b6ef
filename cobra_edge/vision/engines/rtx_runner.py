"""Run an engine of TensorRT for RTX on the first GPU."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np

from ...bundle.engine_key import EngineKey
from ...bundle.reader import Bundle
from ...errors import BundleError, MachineError
from .device_buffers import Gpu
from .engine_run import EngineRun, Tensor
from .runtime_cache import RuntimeCache

log = logging.getLogger(__name__)


class RtxVision:
    """An open engine with its buffers on the GPU."""

    def __init__(self, engine: bytes | bytearray | memoryview, key: EngineKey, bundle: Bundle, gpu: Gpu) -> None:
        """Deserialize an engine and compile its kernels, or load them from the runtime cache.

        Raises:
            MachineError: the GPU or the library rejects it.
            BundleError: its input and output do not match the bundle.
        """
        import tensorrt_rtx as trt

        self.name = f"TensorRT for RTX {key.version}, {gpu.name}, {key.precision}"
        self._kernels = RuntimeCache(key, gpu)
        self._logger = _logger(trt)
        self._failed = partial(_failure, self.name, self._logger)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._made(self._runtime.deserialize_cuda_engine(engine), "opening the engine")
        taken, given = self._ends(trt, bundle)
        self._run = EngineRun(self._compiled_context(), taken, given, self._failed)
        self._kernels_saved = False

    def _compiled_context(self) -> Any:
        """Compile the engine for the GPU."""
        config = self._made(self._engine.create_runtime_config(), "configuring the engine")
        self._compiled = self._made(config.create_runtime_cache(), "making a runtime cache")
        self._kernels.load(self._compiled)
        config.set_runtime_cache(self._compiled)
        return self._made(self._engine.create_execution_context(config), "compiling the engine for the GPU")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn the graph's input, float32 pixels or uint8 images, into embeddings (n_visual_tokens, d_model) float32.

        Raises:
            MachineError: the GPU failed.
        """
        embeddings = self._run.embed(pixels)
        self._keep_kernels()
        return embeddings

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """See `GpuVision.embed_into`; waits after the first image only. Raises what `embed` raises."""
        self._run.embed_into(pixels, address, stream)
        self._keep_kernels()

    def _keep_kernels(self) -> None:
        if not self._kernels_saved:
            self._run.finish()  # kernels compiled lazily are compiled by then
            self._kernels.save(self._compiled)
            self._kernels_saved = True

    def close(self) -> None:
        """Free device memory, in the order of dependence; a second call does nothing."""
        self._run.close()
        self._compiled = self._engine = self._runtime = None

    def _made(self, thing: Any, doing: str) -> Any:
        """Return the library's object. Raises MachineError, with the library's message, if it is None."""
        if thing is None:
            raise self._failed(doing)
        return thing

    def _ends(self, trt: Any, bundle: Bundle) -> tuple[Tensor, Tensor]:
        """Return the input and the output. Raises BundleError if they do not match the bundle."""
        engine, config = self._engine, bundle.manifest.model
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            n: Tensor(n, tuple(engine.get_tensor_shape(n)), np.dtype(trt.nptype(engine.get_tensor_dtype(n)))) for n in names
        }
        inputs = [found[n] for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [found[n] for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        taken, float32 = np.dtype(bundle.vision_graph.input), np.dtype(np.float32)
        given = (1, config.n_visual_tokens, config.mamba.d_model)
        if [t.dtype for t in inputs] != [taken] or [(t.dtype, t.shape) for t in outputs] != [(float32, given)]:
            got = ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in found.values())
            raise BundleError(
                f"{bundle.directory}: its engine has {got}; expected one input of {taken} and one output of float32 "
                f"{list(given)}; export the bundle again"
            )
        return inputs[0], outputs[0]


def _failure(name: str, logger: Any, doing: str) -> MachineError:
    """Return the error of a failed call, with the library's message."""
    return MachineError(f"{name}: {doing} failed: {logger.take()}")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Collects the library's errors for our messages; prints nothing."""

        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                log.info("TensorRT for RTX: %s", message.strip())

        def take(self) -> str:
            """Return the last errors, and clear them."""
            words, self._errors = "; ".join(self._errors[-2:]) or "no reason given", []
            return words

    return Logger()
