"""Build TensorRT for RTX engines for consumer GPUs, ahead of time on a machine without one.

The build decides what is fused; kernels are compiled on the GPU when the engine is opened, and cached there (`runtime_cache`).
So a build needs no GPU, takes seconds, and serves many GPUs. Nothing is timed: the library's timing cache has done nothing
since version 1.2, and none is written.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...bundle.engine_key import EngineKey, RuntimeName
from ...bundle.reader import VISION
from ...environment.available_memory import available_bytes, require_memory
from ...environment.requirements import install_hint
from ...errors import InputError, MachineError
from ...formats.precision import PrecisionName, capability_number, precision_named, why_no_gpu_of
from ...formats.targets import Target
from .cache import onnx_digest
from .layer_summary import LayerSummary
from .rtx_builder import Event, Failed, Finished, Job, Progressed
from .weight_stripping import strip_weights as write_stripped

RUNTIME: RuntimeName = "tensorrt-rtx"
ENGINES = "engines"
_TURING = "7.5"
# Measured with the 2.95 GB of a full-size float32 tower, stored next to the graph: the builder took 3.5 GB besides the pages of
# that file. Of weights inside the graph the parser holds another copy.
_MEMORY_PER_BYTE, _MEMORY_PER_INNER_BYTE, _MEMORY_BYTES = 1.3, 3.0, 500_000_000

OnProgress = Callable[[str, int, int], None]  # phase, progress of the whole build, its total
_PROGRESS_TOTAL = 1000


@dataclass(frozen=True)
class Built:
    """A built engine: its key and its layers."""

    key: EngineKey
    layers: LayerSummary


def why_not_installed() -> str | None:
    """Return why TensorRT for RTX is not installed, or None if it is; does not load it."""
    found = importlib.util.find_spec("tensorrt_rtx") is not None
    return None if found else f"tensorrt_rtx is not installed ({install_hint('rtx')})"


def why_no_tensorrt_rtx() -> str | None:
    """Return why TensorRT for RTX cannot be loaded, or None if it can."""
    if (reason := why_not_installed()) is not None:
        return reason
    try:
        import tensorrt_rtx  # noqa: F401 - only whether its libraries load
    except (ImportError, OSError, RuntimeError) as error:
        return f"tensorrt_rtx cannot be loaded ({error}); install it again: {install_hint('rtx')}"
    return None


def require_tensorrt_rtx() -> None:
    """Raise MachineError, with the install command, if TensorRT for RTX cannot be loaded."""
    reason = why_no_tensorrt_rtx()
    if reason is not None:
        raise MachineError(reason)


def library_version() -> str:
    """Return the version of the installed library."""
    import tensorrt_rtx

    return str(tensorrt_rtx.__version__)


def supported_capabilities() -> tuple[str, ...]:
    """Return the compute capabilities that the installed library supports, in order, such as ("7.5", …, "12.0")."""
    import tensorrt_rtx

    names = [n[2:] for n in dir(tensorrt_rtx.ComputeCapability) if n.startswith("SM") and n[2:].isdigit()]
    return tuple(f"{n[:-1]}.{n[-1]}" for n in sorted(names, key=int))


def capabilities_of(target: Target) -> tuple[str, ...]:
    """Return the compute capabilities of an engine for a target: its GPU's, or all since Ampere if the target is any RTX GPU.

    Raises:
        InputError: the library does not support the target's GPU.
    """
    if target.compute_capability is None:
        return tuple(c for c in supported_capabilities() if c != _TURING)
    _require_supported((target.compute_capability,))
    return (target.compute_capability,)


def build_engine(
    graph: Path,
    file: Path,
    precision: PrecisionName,
    capabilities: Sequence[str],
    onnx_sha256: str,
    *,
    strip_weights: bool = False,
    on_progress: OnProgress | None = None,
) -> Built:
    """Build the engine of a graph into a file. Needs no GPU; a failed or interrupted build leaves no files.

    Args:
        graph: an ONNX file, with its external data next to it.
        file: path of the engine; its directory exists.
        precision: of the graph, a name of `precision.PRECISIONS`; part of the key.
        capabilities: CUDA compute capabilities to support, such as ("8.6", "8.9").
        onnx_sha256: hash over graph and data, for the key.
        strip_weights: omit weights that the graph contains (weight_stripping.py).
        on_progress: called with the phase, the progress of the whole build and its total.

    Raises:
        InputError: an unsupported capability or precision, or a graph that cannot be parsed or built.
        MachineError: the library is missing, or there is too little memory.
    """
    require_tensorrt_rtx()
    _require_supported(capabilities)
    refused = why_no_precision(precision, capabilities)
    if refused is not None:
        raise InputError(refused)
    require_memory(_needed_bytes(graph), f"building an engine of {graph.name}")
    key = EngineKey(
        RUNTIME, library_version(), tuple(sorted(capabilities, key=capability_number)), precision, onnx_sha256, strip_weights
    )
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".building-") as scratch:
        draft = Path(scratch) / "engine"
        finished = _run_builder(graph, draft, key, on_progress or (lambda phase, done, total: None))
        if strip_weights:
            write_stripped(draft, graph, Path(scratch) / "stripped")
            draft = Path(scratch) / "stripped"
        draft.replace(file)
    return Built(key, finished.layers)


def add_engine(
    stage: Path,
    graph_files: dict[str, str],
    precision: PrecisionName,
    target: Target,
    *,
    strip_weights: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, EngineKey]:
    """Build the engine of a staged bundle's graph, `engines/<stem>.engine`, and its layers, `engines/<stem>.layers.json`.

    Args:
        stage: the staging directory, with vision.onnx.
        graph_files: {name: sha256} of vision.onnx and its data.
        precision: of the graph.
        target: the device to build for.
        strip_weights, on_progress: see `build_engine`.

    Returns:
        The entry of Manifest.engines: the engine's key by its file name.

    Raises:
        InputError, MachineError: see `build_engine`; or the target's GPU does not support this precision.
    """
    require_tensorrt_rtx()
    directory = stage / ENGINES
    directory.mkdir(exist_ok=True)
    draft = directory / ".engine"
    built = build_engine(
        stage / VISION,
        draft,
        precision,
        capabilities_of(target),
        onnx_digest(graph_files),
        strip_weights=strip_weights,
        on_progress=on_progress,
    )
    engine = directory / f"{built.key.stem}.engine"
    draft.replace(engine)
    engine.with_name(f"{built.key.stem}.layers.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(built.layers)) + b"\n"
    )
    return {f"{ENGINES}/{engine.name}": built.key}


def why_too_little_memory(graph: Path) -> str | None:
    """Return why the memory is too small to build an engine of this graph, or None if it suffices."""
    there, needed = available_bytes(), _needed_bytes(graph)
    if there is None or there >= needed:
        return None
    return f"building one takes about {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available"


def _require_supported(capabilities: Sequence[str]) -> None:
    supported = supported_capabilities()
    unknown = sorted(set(capabilities) - set(supported))
    if unknown or not capabilities:
        raise InputError(
            f"TensorRT for RTX {library_version()} does not support compute capability {', '.join(unknown) or 'none'}; "
            f"it supports {', '.join(supported)}"
        )


def why_no_precision(precision: str, capabilities: Sequence[str]) -> str | None:
    """Return why the library does not support a precision on these GPUs, or None; the oldest of them decides."""
    oldest = min(capabilities, key=capability_number)
    reason = why_no_gpu_of(oldest, precision_named(precision), "the oldest requested GPU")
    if reason is not None:
        return reason
    if oldest == _TURING and precision != "fp16":
        return f"TensorRT for RTX has no float32 matmuls on compute capability {_TURING}, and {precision} has some; use fp16"
    return None


def _graph_bytes(graph: Path) -> tuple[int, int]:
    """Return the bytes of the graph file, and of its external data."""
    beside = sum(f.stat().st_size for f in graph.parent.glob(f"{graph.name}.data*"))
    return graph.stat().st_size, beside


def _needed_bytes(graph: Path) -> int:
    """Return the estimated memory of a build."""
    inner, beside = _graph_bytes(graph)
    return int(_MEMORY_PER_INNER_BYTE * inner + _MEMORY_PER_BYTE * beside) + _MEMORY_BYTES


def _run_builder(graph: Path, engine: Path, key: EngineKey, on_progress: OnProgress) -> Finished:
    """Run the build in a child process, which is killed if this process ends or is interrupted."""
    job = Job(str(graph), str(engine), key.capabilities, sum(_graph_bytes(graph)))
    command = [sys.executable, "-m", f"{__package__}.rtx_builder"]
    with (
        tempfile.TemporaryFile() as noise,
        # In its own session: Ctrl-C reaches only this process, which then kills the builder.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, start_new_session=True
        ) as builder,
    ):
        assert builder.stdin is not None and builder.stdout is not None
        last: Event | None = None
        try:
            with suppress(BrokenPipeError):  # the child exited early: its exit code and output are reported
                builder.stdin.write(msgspec.json.encode(job))
                builder.stdin.close()
            for line in builder.stdout:
                if not line.endswith(b"\n"):  # killed in the middle of a line
                    break
                last = msgspec.json.decode(line, type=Event)
                if isinstance(last, Progressed):
                    on_progress(last.phase, int(last.share * _PROGRESS_TOTAL), _PROGRESS_TOTAL)
        except BaseException:
            builder.kill()
            raise
        code = builder.wait()
        noise.seek(0)
        words = noise.read().decode(errors="replace").strip()
    return _finished(last, code, words, graph, key)


def _finished(last: Event | None, code: int, words: str, graph: Path, key: EngineKey) -> Finished:
    """Return the outcome of a successful build. Raises InputError or MachineError for a failed one."""
    if isinstance(last, Finished):
        return last
    library = f"TensorRT for RTX {key.version}"
    if isinstance(last, Failed):
        if last.unreadable:
            raise InputError(f"{graph}: {library} cannot parse it ({last.reason}); export it again")
        if "alloc" in last.reason.lower() or "memory" in last.reason.lower():
            raise MachineError(f"{library} ran out of memory or disk space ({last.reason}); {_needed(graph)}")
        raise InputError(
            f"{graph}: {library} cannot build a {key.precision} engine for compute capability {', '.join(key.capabilities)} "
            f"({last.reason}); use another --vision-precision or target"
        )
    if code < 0:
        name = signal.Signals(-code).name
        raise MachineError(f"the builder of {library} was killed by {name}, most likely out of memory; {_needed(graph)}")
    raise MachineError(f"the builder of {library} exited with code {code}; its output: {words[-500:] or 'none'}")


def _needed(graph: Path) -> str:
    there = available_bytes()
    have = "unknown" if there is None else f"{there / 1e9:.1f} GB"
    return f"about {_needed_bytes(graph) / 1e9:.1f} GB are needed, available: {have}"
