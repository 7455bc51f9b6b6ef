"""TensorRT as JetPack brings it: whether it is here, what its engines are called, and running one.

The graph carries its own types (casts to 16 bits, or quantize and dequantize for int8), so networks are always strongly typed:
TensorRT 10 does so when it is asked, 11 knows nothing else. Engines are built by `tensorrt_build`.

Source: NVIDIA TensorRT documentation, "Strongly Typed Networks", "Explicit Quantization", "Migrating from 10.x to 11.x".
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from functools import partial
from typing import Any

import numpy as np

from ...bundle.engine_key import EngineKey
from ...bundle.reader import Bundle
from ...errors import MachineError
from ...formats.precision import precision_named, why_no_gpu_of
from ..session import INPUT, OUTPUT
from .build_memory import available_bytes
from .cache import EngineCache, onnx_digest
from .device_buffers import Gpu, checked, first_gpu, why_no_cuda
from .engine_run import EngineRun, Tensor

VERSION_MIN = (10, 3)
HOW_TO_GET = (
    "on a Jetson it comes with JetPack 6.1 or later (sudo apt install nvidia-jetpack; a virtual environment sees it when made "
    "with --system-site-packages), or use a container of export/containers"
)


def tensorrt() -> Any:
    """Import NVIDIA's module, which is there where `why_no_tensorrt` says None."""
    return importlib.import_module("tensorrt")


def why_no_tensorrt() -> str | None:
    """Return why TensorRT cannot be used here, or None where it can."""
    if importlib.util.find_spec("tensorrt") is None:
        return f"TensorRT is not installed; {HOW_TO_GET}"
    try:
        version = str(tensorrt().__version__)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"TensorRT is installed but cannot be loaded ({error}); {HOW_TO_GET}"
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < VERSION_MIN:
        return f"TensorRT is {version}, {VERSION_MIN[0]}.{VERSION_MIN[1]} or later is needed; {HOW_TO_GET}"
    return why_no_cuda()


def graph_bytes(bundle: Bundle) -> int:
    """Return the size of the graph and its data."""
    return sum(bundle.manifest.files[name].bytes for name in bundle.graph_files)


def engine_key(bundle: Bundle, gpu: Gpu) -> EngineKey:
    """Return what identifies the engine of a bundle's graph, by the TensorRT that is here, for a GPU."""
    cuda = importlib.import_module("cuda.bindings.runtime")
    attribute = cuda.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
    # All Jetson Orins are called "Orin" and have one compute capability; kernels are chosen by timing them on one of them.
    processors = checked(cuda.cudaDeviceGetAttribute(attribute, 0), "asking the GPU for its size")
    return EngineKey(
        "tensorrt",
        str(tensorrt().__version__),
        (gpu.capability,),
        bundle.vision_graph.precision,
        onnx_digest(bundle.graph_files),
        gpu=f"{gpu.name}, {processors} multiprocessors",
    )


def refuses(bundle: Bundle, cache: EngineCache | None = None) -> str | None:
    """Return why TensorRT does not run a bundle's vision here, or None where it does, perhaps after building the engine."""
    from .tensorrt_build import why_too_little_memory

    reason = why_no_tensorrt()
    if reason is not None:
        return reason
    gpu = first_gpu()
    reason = why_no_gpu_of(gpu.capability, precision_named(bundle.vision_graph.precision), gpu.name)
    if reason is not None or (cache or EngineCache()).has(engine_key(bundle, gpu)):
        return reason
    return why_too_little_memory(bundle, gpu)


def open_engine(bundle: Bundle) -> TensorRTRunner:
    """Open the engine of a bundle from the user's cache; where it is missing or does not fit it is built first.

    Raises:
        MachineError: memory or disk do not suffice, or TensorRT cannot build or run it.
    """
    from ...terminal.output import stages, tell
    from .tensorrt_build import engine_of

    reason = refuses(bundle)
    if reason is not None:
        raise MachineError(reason)
    cache, key = EngineCache(), engine_key(bundle, first_gpu())
    data = cache.read(key)
    if data is not None:
        try:
            return TensorRTRunner(data, bundle)
        except UnreadableEngineError as error:
            tell(f"{error}; it is built again")
    built = engine_of(bundle, cache, stages, tell, force=data is not None)
    data = cache.read(key)
    if data is None:
        raise MachineError(f"{built.file}: is not what was just written there; check the disk")
    return TensorRTRunner(data, bundle)


class UnreadableEngineError(MachineError):
    """TensorRT does not read an engine of the right key: a patch of TensorRT or of the driver came in between."""


def listener() -> Any:
    """Return a logger for TensorRT that keeps errors and warnings in `.heard` and prints nothing."""
    trt = tensorrt()

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.heard: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.heard.append(message)

    return Listener()


class TensorRTRunner:
    """A built engine, ready to run."""

    def __init__(self, engine: bytes, bundle: Bundle) -> None:
        """Open an engine on the first GPU.

        Args:
            engine: as it was built.
            bundle: what it was built from.

        Raises:
            UnreadableEngineError: TensorRT does not read it, or its input and output are not the bundle's.
            MachineError: no memory to run it.
        """
        trt = tensorrt()
        self.name = f"TensorRT {trt.__version__}, {first_gpu().name}"
        # Kept in the order in which they depend on each other: TensorRT wants each to outlive what was made from it.
        self._logger = listener()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise UnreadableEngineError(f"TensorRT {trt.__version__} does not read the engine{_last_words(self._logger)}")
        self._check(bundle)
        context = self._engine.create_execution_context()
        if context is None:
            raise MachineError(f"TensorRT has no memory to run the engine{_last_words(self._logger)}; close other programs")
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
            raise UnreadableEngineError(f"the engine takes and gives {got}, expected {expected} of {INPUT} and {OUTPUT}")

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn what `ImageTransform.pixels` gives into visual embeddings (n_visual_tokens, d_model) float32."""
        return self._run.embed(pixels)

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """See `GpuVision.embed_into`. Raises MachineError."""
        self._run.embed_into(pixels, address, stream)

    def close(self) -> None:
        """Give the GPU's memory back, the engine's before what it uses; again is nothing."""
        self._run.close()
        self._engine = self._runtime = None


def _failure(logger: Any, doing: str) -> MachineError:
    return MachineError(f"TensorRT: {doing} failed{_last_words(logger)}")


def _last_words(logger: Any) -> str:
    return f" ({logger.heard[-1]})" if logger.heard else ""


def shares_memory() -> bool:
    """Return whether the first GPU and the processor have one memory, as on a Jetson."""
    cuda = importlib.import_module("cuda.bindings.runtime")
    attribute = cuda.cudaDeviceAttr.cudaDevAttrIntegrated
    return bool(checked(cuda.cudaDeviceGetAttribute(attribute, 0), "asking the GPU for its kind"))


def free_bytes(gpu: Gpu) -> int:
    """Return the memory that a build can have: of processor and GPU the less, or what both share.

    CUDA does not count caches of files on a Jetson, which Linux would drop, so there Linux is asked alone.
    """
    there = available_bytes()
    if there is None:
        return gpu.free_bytes
    return there if shares_memory() else min(there, gpu.free_bytes)
