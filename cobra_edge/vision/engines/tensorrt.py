"""Run a bundle's vision as a TensorRT engine.

The graph carries its own types (casts to 16 bits, or quantize and dequantize for int8), so networks are always strongly typed:
TensorRT 10 does so on request, TensorRT 11 always.

Source: NVIDIA TensorRT documentation, "Strongly Typed Networks", "Explicit Quantization", "Migrating from 10.x to 11.x".
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ...bundle.reader import Bundle
from ...errors import MachineError
from ...terminal.output import stages, tell
from ..session import INPUT, OUTPUT
from .cache import EngineCache
from .device_buffers import first_gpu
from .engine_run import EngineRun, Tensor
from .tensorrt_build import engine_key, engine_of, refuses
from .tensorrt_library import listener, tensorrt


def open_engine(bundle: Bundle) -> TensorRTRunner:
    """Open the engine of a bundle from the user's cache; build it first if it is missing or unreadable.

    Raises:
        MachineError: too little memory or disk space, or TensorRT cannot build or run it.
    """
    reason = refuses(bundle)
    if reason is not None:
        raise MachineError(reason)
    cache, key = EngineCache(), engine_key(bundle, first_gpu())
    data = cache.read(key)
    if data is not None:
        try:
            return TensorRTRunner(data, bundle)
        except UnreadableEngineError as error:
            tell(f"{error}; it is rebuilt")
    built = engine_of(bundle, cache, stages, tell, force=data is not None)
    data = cache.read(key)
    if data is None:
        raise MachineError(f"{built.file}: its content differs from what was just written; check the disk")
    return TensorRTRunner(data, bundle)


class UnreadableEngineError(MachineError):
    """TensorRT cannot deserialize an engine with the right key, such as after a patch of TensorRT or of the driver."""


class TensorRTRunner:
    """A built engine, ready to run."""

    def __init__(self, engine: bytes, bundle: Bundle) -> None:
        """Open an engine on the first GPU.

        Args:
            engine: the serialized engine.
            bundle: the bundle it was built from.

        Raises:
            UnreadableEngineError: TensorRT cannot deserialize it, or its input and output do not match the bundle.
            MachineError: too little memory to run it.
        """
        trt = tensorrt()
        self.name = f"TensorRT {trt.__version__}, {first_gpu().name}"
        # In the order of dependence: TensorRT requires each to outlive the objects made from it.
        self._logger = listener()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise UnreadableEngineError(f"TensorRT {trt.__version__} cannot read the engine{_last_message(self._logger)}")
        self._check(bundle)
        context = self._engine.create_execution_context()
        if context is None:
            raise MachineError(f"TensorRT has no memory to run the engine{_last_message(self._logger)}; close other programs")
        kinds = {trt.DataType.FLOAT: np.float32, trt.DataType.UINT8: np.uint8}
        taken, given = (
            Tensor(n, tuple(self._engine.get_tensor_shape(n)), np.dtype(kinds[self._engine.get_tensor_dtype(n)]))
            for n in (INPUT, OUTPUT)
        )
        self._run = EngineRun(context, taken, given, partial(_failure, self._logger))

    def _check(self, bundle: Bundle) -> None:
        trt, config = tensorrt(), bundle.manifest.model
        graph = bundle.vision_graph
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        got: list[Any] = [sorted(names)]
        if names == {INPUT, OUTPUT}:
            got = [self._engine.get_tensor_dtype(n) for n in (INPUT, OUTPUT)] + [tuple(self._engine.get_tensor_shape(OUTPUT))]
        entering = trt.DataType.UINT8 if graph.input == "uint8" else trt.DataType.FLOAT
        expected = [entering, trt.DataType.FLOAT, (1, config.n_visual_tokens, config.mamba.d_model)]
        if got != expected:
            raise UnreadableEngineError(f"the engine's input and output are {got}, expected {expected} of {INPUT} and {OUTPUT}")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn the result of `ImageTransform.pixels` into visual embeddings (n_visual_tokens, d_model) float32."""
        return self._run.embed(pixels)

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """See `GpuVision.embed_into`. Raises MachineError."""
        self._run.embed_into(pixels, address, stream)

    def close(self) -> None:
        """Free device memory, in the order of dependence; a second call does nothing."""
        self._run.close()
        self._engine = self._runtime = None


def _failure(logger: Any, doing: str) -> MachineError:
    return MachineError(f"TensorRT: {doing} failed{_last_message(logger)}")


def _last_message(logger: Any) -> str:
    return f" ({logger.heard[-1]})" if logger.heard else ""
