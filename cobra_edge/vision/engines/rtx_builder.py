"""Child process that builds a TensorRT for RTX engine.

    python -m cobra_edge.vision.engines.rtx_builder        # a Job as JSON on stdin, events as JSON lines on stdout

It is a process of its own because one step takes most of the build and cannot be interrupted, because the library prints
to stderr, and because the kernel may kill it when memory runs out. Needs no GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import msgspec

from .layer_summary import LayerSummary, read_layers

_REPORT_SECONDS = 0.05
_COMPILING = 0.5  # share of the progress bar for compiling; the rest is writing, which takes as long for a large graph


class Job(msgspec.Struct, frozen=True):
    """What to build: the ONNX file, the engine's path, compute capabilities such as "8.6"; bytes of weights, for progress."""

    graph: str
    engine: str
    capabilities: tuple[str, ...]
    weights_bytes: int


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """The builder's current phase, and the share of the work that is done."""

    phase: str
    share: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The engine is written."""

    layers: LayerSummary


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The build failed: the builder's message, and whether the graph could not be parsed."""

    reason: str
    unreadable: bool


Event = Progressed | Finished | Failed


class _Phases:
    """Progress over nested phases: each step of a phase counts the same, and an inner phase subdivides its step."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int, int]] = []  # name, steps, steps done
        self._share = 0.0

    def start(self, name: str, steps: int) -> None:
        self._open.append((name, max(1, steps), 0))

    def step(self, name: str, step: int) -> None:
        self._open = [(n, s, step + 1) if n == name else (n, s, done) for n, s, done in self._open]

    def finish(self, name: str) -> None:
        self._open = [p for p in self._open if p[0] != name]

    def share(self) -> float:
        """Return the share that is done. It does not fall where a phase ends before its step in the phase around it counts."""
        share = 0.0
        for _, steps, done in reversed(self._open):
            share = min(1.0, (done + share) / steps)
        self._share = max(self._share, share)
        return self._share


def build(job: Job, tell: Callable[[Event], None]) -> Finished | Failed:
    """Build the engine of a job and return the outcome. `tell` raises BrokenPipeError once the parent is gone."""
    import tensorrt_rtx as trt

    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.graph):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = [f"{e.desc()}{f' at {e.node_operator()} {e.node_name()}' if e.node_operator() else ''}" for e in errors]
        return Failed("; ".join(reasons) or logger.reason(), unreadable=True)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = len(job.capabilities)
    for i, capability in enumerate(job.capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, sm_name(capability)), i)
    config.progress_monitor = monitor = _monitor(trt, tell)
    with open(job.engine, "wb") as file:
        writer = _writer(trt, file, job.weights_bytes, tell)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
    if monitor.cancelled:
        raise BrokenPipeError
    if not done:
        return Failed(logger.reason(), unreadable=False)
    return Finished(read_layers(logger.layers))


def sm_name(capability: str) -> str:
    """Return the library's name for a compute capability: "8.6" is SM86."""
    return "SM" + capability.replace(".", "")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Collects errors, and the message that describes the finished engine."""

        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self._errors.append(message.strip())
            elif message.startswith("Layers:\n"):
                self.layers = message

        def reason(self) -> str:
            """Return the first error. "No GPU" accompanies every error and is skipped, unless it is the only one."""
            return next((e for e in self._errors if "cudaError 35" not in e), (self._errors or ["no reason given"])[0])

    return Logger()


def _monitor(trt: Any, tell: Callable[[Event], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports progress at a limited rate; cancels the build once the parent is gone."""

        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False
            self._phases, self._told = _Phases(), -1.0

        def phase_start(self, name: str, _parent: str | None, steps: int) -> None:
            self._phases.start(name, steps)
            self._tell(name)

        def phase_finish(self, name: str) -> None:
            self._phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            self._phases.step(name, step)
            self._tell(name)
            return not self.cancelled

        def _tell(self, name: str) -> None:
            if time.monotonic() - self._told < _REPORT_SECONDS:
                return
            self._told = time.monotonic()
            try:
                tell(Progressed(name, _COMPILING * self._phases.share()))
            except OSError:
                self.cancelled = True

    return Monitor()


def _writer(trt: Any, file: BinaryIO, expected_bytes: int, tell: Callable[[Event], None]) -> Any:
    class Writer(trt.IStreamWriter):
        """Streams the engine to a file; keeps an error, because exceptions must not cross the library."""

        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None
            self._written = 0

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
                self._written += len(data)
                done = min(1.0, self._written / max(1, expected_bytes))
                tell(Progressed("Writing the engine", _COMPILING + (1 - _COMPILING) * done))
            except OSError as error:
                self.error = error
                return 0
            return len(data)

    return Writer()


def _main() -> int:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the library's output out of the events

    def tell(event: Event) -> None:
        out.write(msgspec.json.encode(event) + b"\n")
        out.flush()

    try:
        tell(build(job, tell))
    except BrokenPipeError:
        return 1
    except OSError as error:
        tell(Failed(f"{error.strerror}: {error.filename or job.engine}", unreadable=False))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
