"""Run the vision graph with onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import platformdirs

from ..bundle.memory_plan import lacks_memory
from ..environment.threads import default_threads
from ..errors import BundleError, MachineError
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName
from ..inputs.image import ImageTransform
from .providers import PROVIDERS, Provider, eligible, provider_options

log = logging.getLogger(__name__)

INPUT, OUTPUT = "pixels", "embeddings"
_CPU = PROVIDERS[-1]
_TYPES = {"float32": "tensor(float)", "uint8": "tensor(uint8)"}


def open_on_cpu(file: Path, threads: int | None = None) -> Any:
    """Open any graph on the CPU. Raises BundleError if onnxruntime cannot."""
    try:
        return _open(file, _CPU, "fp32", threads)
    except Exception as error:  # onnxruntime's own exception types share no base but Exception
        raise _failed(file, "open", error) from error


def _failed(file: Path, what: str, error: Exception) -> BundleError | MachineError:
    """Return the error for an operation that onnxruntime failed on; its message comes last."""
    if lacks_memory(error) or "alloc" in str(error):  # it has no exception type for that
        return MachineError(f"no memory to {what} {file}; close other programs, or raise this process's limit ({error})")
    return BundleError(f"{file}: onnxruntime cannot {what} it; export the bundle again ({error})")


def runtime_options(threads: int | None = None) -> Any:
    """Return the options of all our sessions: number of threads (None for `default_threads`), no spinning."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # By default onnxruntime ignores CPU quotas and binds each thread to a core, however busy that is.
    options.intra_op_num_threads = threads or default_threads()
    # Spinning threads would block the cores that the decoder needs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open(file: Path, provider: Provider, precision: PrecisionName, threads: int | None, stream: int | None = None) -> Any:
    options = runtime_options(threads)
    cache = str(platformdirs.user_cache_path("cobra_edge") / "onnxruntime")
    chosen = (provider.name, dict(provider_options(provider, precision, cache, stream)))
    # The CPU provider runs operators without a GPU kernel, such as those on shapes.
    wanted = [chosen] if provider is _CPU else [chosen, (_CPU.name, {})]
    # A fallback would print the first failure on stdout.
    return onnxruntime.InferenceSession(file, options, providers=wanted, enable_fallback=0)


class VisionSession:
    """An open vision graph, run by onnxruntime.

    Attributes:
        name: "onnxruntime, " and the execution provider that runs it.
    """

    def __init__(
        self,
        file: Path,
        config: CobraConfig,
        form: InputForm = "float32",
        threads: int | None = None,
        device: str = "cpu",
        precision: PrecisionName = "fp32",
        stream: int | None = None,
    ) -> None:
        """Open the graph on the best execution provider that accepts it; the reasons of better ones are logged.

        Args:
            file: the graph.
            config: of the model it belongs to.
            form: input form of the graph.
            threads: on a CPU; None for one per physical core.
            device: "auto", "cpu" or "cuda".
            precision: of its matmuls.
            stream: the cudaStream_t for a GPU provider, which must outlive the session; None or 0 for its own.

        Raises:
            BundleError: unreadable, or its input and output do not match the config.
            MachineError: no provider accepts it; the message has each reason.
        """
        self._file, self._rows = file, (1, config.n_visual_tokens, config.mamba.d_model)
        self._session, provider = _first_that_opens(file, threads, device, precision, stream)
        self.name = f"onnxruntime, {provider.title}"
        self._require_ends(file, config, form)
        self._stream = stream or None
        on_gpu = provider is not _CPU
        self._binding: Any = self._bound() if on_gpu else None
        self._gpu_binding: Any = self._session.io_binding() if on_gpu else None

    def _require_ends(self, file: Path, config: CobraConfig, form: InputForm) -> None:
        shape = ImageTransform.of(config, form).shape
        wanted = [(INPUT, _TYPES[form], list(shape))]
        wanted += [(OUTPUT, _TYPES["float32"], [1, config.n_visual_tokens, config.mamba.d_model])]
        got = [(i.name, i.type, i.shape) for i in (*self._session.get_inputs(), *self._session.get_outputs())]
        if got != wanted:
            raise BundleError(f"{file}: inputs and outputs are {got}, expected {wanted}; export the bundle again")

    def _bound(self) -> Any:
        """Bind the output to a reusable host buffer."""
        binding = self._session.io_binding()
        self._embeddings = np.empty(self._rows, np.float32)
        binding.bind_output(OUTPUT, "cpu", 0, np.float32, self._embeddings.shape, self._embeddings.ctypes.data)
        return binding

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn the result of `ImageTransform.pixels` into visual embeddings (n_visual_tokens, d_model) float32.

        Raises:
            BundleError: the graph fails, or its output differs from its declared shape. MachineError: GPU error, out of memory.
        """
        if self._binding is None:
            embeddings = self._run_on_cpu(pixels)
            if embeddings.shape != self._rows or embeddings.dtype != np.float32:
                raise BundleError(
                    f"{self._file}: the graph returned {embeddings.shape} {embeddings.dtype}, expected {self._rows} float32 as "
                    "declared; export the bundle again"
                )
            return embeddings[0]
        try:
            self._run(self._binding, pixels)
            self._binding.synchronize_outputs()
        except Exception as error:  # as above
            raise MachineError(f"{self.name}: running the graph failed: {error}") from error
        return self._embeddings[0].copy()

    def _run_on_cpu(self, pixels: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = self._session.run([OUTPUT], {INPUT: pixels})[0]
            return found
        except Exception as error:  # as above
            raise _failed(self._file, "run", error) from error

    @property
    def embed_into(self) -> Callable[[np.ndarray, int, int], None] | None:
        """See `runtimes.GpuVision.embed_into`; None on a CPU."""
        return None if self._gpu_binding is None else self._embed_into

    def _embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        # A run synchronizes by default. Disabling that would not order the next image's copy after it.
        shape = self._embeddings.shape
        try:
            self._gpu_binding.bind_output(OUTPUT, "cuda", 0, np.float32, shape, address)
            self._run(self._gpu_binding, pixels)
            if self._stream != stream:
                self._gpu_binding.synchronize_outputs()
        except Exception as error:  # as above
            raise MachineError(f"{self.name}: running the graph failed: {error}") from error

    def _run(self, binding: Any, pixels: np.ndarray) -> None:
        binding.bind_cpu_input(INPUT, np.ascontiguousarray(pixels))
        self._session.run_with_iobinding(binding)

    def close(self) -> None:
        """Free the session."""
        self._binding = self._gpu_binding = self._session = None


def _first_that_opens(
    file: Path, threads: int | None, device: str, precision: PrecisionName, stream: int | None
) -> tuple[Any, Provider]:
    candidates, reasons = eligible(device)
    for provider in candidates:
        if provider is _CPU and precision == "bf16":
            reasons.append("CPU: onnxruntime has no bfloat16 matmuls there; export with --vision-precision fp16")
            continue
        try:
            session = _open(file, provider, precision, threads, stream)
        except Exception as error:  # as above
            if provider is _CPU:  # supports every graph of ours
                raise _failed(file, "open", error) from error
            reasons.append(f"{provider.title}: {error}")
            continue
        if session.get_providers()[0] != provider.name:
            reasons.append(f"{provider.title}: its libraries do not load here")
            continue
        for reason in reasons:
            log.info("vision: not on %s", reason)
        return session, provider
    raise MachineError(f"{file}: no execution provider here runs it ({'; '.join(reasons)})")
