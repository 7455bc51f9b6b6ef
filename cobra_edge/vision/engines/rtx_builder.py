"""TensorRT for RTX builds an engine, in a process of its own.

    python -m cobra_edge.vision.engines.rtx_builder        # a Job as JSON on stdin, events as JSON lines on stdout

A process, because one step of the builder lasts most of the build and listens to nobody, because the library prints on stderr
what it could return, and because it is ended where memory runs out: its end is not ours. Needs no GPU.
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
_COMPILING = 0.5  # share of the progress that is compiling; the rest is writing, which takes as long for a large graph


class Job(msgspec.Struct, frozen=True):
    """What to build: the ONNX file, where the engine goes, capabilities such as "8.6"; the bytes of weights, for progress."""

    graph: str
    engine: str
    capabilities: tuple[str, ...]
    weights_bytes: int


class Progressed(msgspec.Struct, frozen=True, tag="progress"):
    """A phase of the builder, and which share of all work is done."""

    phase: str
    share: float


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The engine is in its file."""

    layers: LayerSummary


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """No engine: the builder's own words, and whether the graph could not even be read."""

    reason: str
    unreadable: bool


Event = Progressed | Finished | Failed


class _Phases:
    """The builder's nested phases as one share: each step of a phase counts alike, a phase inside a step fills that step."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int, int]] = []  # name, steps, steps done

    def start(self, name: str, steps: int) -> None:
        self._open.append((name, max(1, steps), 0))

    def step(self, name: str, step: int) -> None:
        self._open = [(n, s, step + 1) if n == name else (n, s, done) for n, s, done in self._open]

    def finish(self, name: str) -> None:
        self._open = [p for p in self._open if p[0] != name]

    def share(self) -> float:
        share = 0.0
        for _, steps, done in reversed(self._open):
            share = min(1.0, (done + share) / steps)
        return share


def build(job: Job, tell: Callable[[Event], None]) -> Finished | Failed:
    """Build the engine of a job and return how it ended. `tell` raises BrokenPipeError where nobody listens any more."""
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
    """Return the library's name of a compute capability: "8.6" is SM86."""
    return "SM" + capability.replace(".", "")


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        """Keeps errors, and the one message that describes the finished engine."""

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
            """Return the first error; that there is no GPU is said beside every other and is no reason, unless it is alone."""
            return next((e for e in self._errors if "cudaError 35" not in e), (self._errors or ["no reason given"])[0])

    return Logger()


def _monitor(trt: Any, tell: Callable[[Event], None]) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells where the builder is, a few times a second at most; ends the build where nobody listens."""

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
        """Writes the engine as it comes; an error is kept, since none may pass through the library."""

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
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the library prints is no event

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
