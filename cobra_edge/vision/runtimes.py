"""Table of the vision runtimes, with the reasons for refusing a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from ..bundle.reader import Bundle
from ..errors import BundleError, InputError, MachineError
from ..terminal.suggestions import near_matches

log = logging.getLogger(__name__)


class VisionRunner(Protocol):
    """An open vision graph or engine."""

    name: str  # what runs it, such as "onnxruntime, CPU"

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Turn the result of `ImageTransform.pixels` into visual embeddings (n_visual_tokens, d_model) float32."""
        ...

    def close(self) -> None:
        """Free its memory, on a GPU too; it cannot be used afterwards."""
        ...


class GpuVision(VisionRunner, Protocol):
    """A runner on a CUDA GPU that can leave its embeddings there."""

    def embed_into(self, pixels: np.ndarray, address: int, stream: int) -> None:
        """Write the embeddings to device memory, asynchronously if the runtime can.

        Args:
            pixels: see `embed`; kept alive as long as they are read.
            address: device address of contiguous memory for (n_visual_tokens, d_model) float32 on the first GPU, a multiple of
                256, not in use by pending work.
            stream: a cudaStream_t that outlives the runner; work enqueued on it afterwards sees the embeddings.

        Raises:
            MachineError: the GPU failed, and the memory at the address is undefined. A failure found later is raised when the
                stream is synchronized.
        """
        ...


def gpu_vision(runner: Any) -> GpuVision | None:
    """Return the runner if it can leave embeddings on a GPU (has an `embed_into` that is not None), else None."""
    return cast(GpuVision, runner) if getattr(runner, "embed_into", None) is not None else None


@dataclass(frozen=True)
class Wanted:
    """Options for opening a runner.

    Attributes:
        device: "auto", "cpu" or "cuda".
        threads: on a CPU; None for one per physical core.
        stream: the cudaStream_t of the decoder that will read the embeddings, or None.
    """

    device: str = "auto"
    threads: int | None = None
    stream: int | None = None


@dataclass(frozen=True)
class VisionRuntime:
    """One row: its devices, why it refuses a bundle, and how to open it."""

    name: str
    devices: tuple[str, ...]
    refuses: Callable[[Bundle], str | None]
    open: Callable[[Bundle, Wanted], VisionRunner]


def _onnxruntime(bundle: Bundle, wanted: Wanted) -> VisionRunner:
    from .session import VisionSession

    graph, model = bundle.vision_graph, bundle.manifest.model
    return VisionSession(bundle.graph_file(), model, graph.input, wanted.threads, wanted.device, graph.precision, wanted.stream)


def _tensorrt_rtx(bundle: Bundle, _wanted: Wanted) -> VisionRunner:
    from .engines.rtx_vision import open_engine

    return open_engine(bundle)


def _tensorrt_rtx_refuses(bundle: Bundle) -> str | None:
    from .engines.rtx_vision import refuses

    return refuses(bundle)


def _tensorrt(bundle: Bundle, _wanted: Wanted) -> VisionRunner:
    from .engines.tensorrt import open_engine

    return open_engine(bundle)


def _tensorrt_refuses(bundle: Bundle) -> str | None:
    from .engines.tensorrt_build import refuses

    return refuses(bundle)


# In order of preference.
RUNTIMES = (
    VisionRuntime("tensorrt-rtx", ("cuda",), _tensorrt_rtx_refuses, _tensorrt_rtx),
    VisionRuntime("tensorrt", ("cuda",), _tensorrt_refuses, _tensorrt),
    VisionRuntime("onnxruntime", ("cpu", "cuda"), lambda bundle: None, _onnxruntime),
)
RUNTIME_NAMES = ("auto", *(r.name for r in RUNTIMES))


def open_vision(
    bundle: Bundle,
    device: str = "auto",
    runtime: str = "auto",
    threads: int | None = None,
    stream: int | None = None,
) -> VisionRunner:
    """Open the bundle's vision graph on the first runtime that does not refuse.

    Args:
        bundle: an open bundle with vision.
        device: "auto", "cpu" or "cuda". Where no runtime is named and none runs on the GPU, "cuda" takes the CPU and warns: the
            decoder, which takes most of the time, needs no more than the driver.
        runtime: "auto" or a name of the table.
        threads: on a CPU; None for one per physical core.
        stream: the cudaStream_t of the decoder that will read the embeddings, which outlives the runner; or None.

    Raises:
        InputError: an unknown runtime, or the requested one cannot build an engine of this graph.
        BundleError: an engine or the graph does not match the bundle.
        MachineError: every requested runtime refuses; the message has each reason.
    """
    if runtime not in RUNTIME_NAMES:
        raise InputError(f"unknown vision runtime {runtime!r}{near_matches(runtime, RUNTIME_NAMES)}")
    wanted = Wanted(device, threads, stream)
    try:
        return _first_that_opens(bundle, runtime, wanted)
    except MachineError as error:
        if (device, runtime) != ("cuda", "auto"):
            raise
        log.warning("images go through the CPU: %s", error)
    return _first_that_opens(bundle, runtime, Wanted("cpu", threads))


def _first_that_opens(bundle: Bundle, runtime: str, wanted: Wanted) -> VisionRunner:
    reasons: list[str] = []
    for row in RUNTIMES:
        if runtime not in ("auto", row.name):
            continue
        try:
            fits = wanted.device in ("auto", *row.devices)
            reason = row.refuses(bundle) if fits else f"does not run on {wanted.device!r}"
            opened = row.open(bundle, wanted) if reason is None else None
        except BundleError:
            raise
        except (MachineError, InputError) as error:  # a GPU, driver or builder failed; the next runtime may work
            if runtime != "auto" or row is RUNTIMES[-1]:
                if reasons and isinstance(error, MachineError):
                    raise MachineError("; ".join([*reasons, str(error)])) from error
                raise
            opened, reason = None, str(error)
            log.warning("vision: %s failed, trying the next runtime: %s", row.name, error)  # unlike a refusal, not expected
        if opened is not None:
            for refused in reasons:
                log.info("vision: not %s", refused)
            log.info("vision: %s", opened.name)
            return opened
        reasons.append(f"{row.name}: {reason}")
    raise MachineError(f"no runtime here runs this bundle's vision on {wanted.device!r} ({'; '.join(reasons)})")
