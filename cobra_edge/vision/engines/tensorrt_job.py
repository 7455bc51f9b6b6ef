"""Child process that builds a TensorRT engine: a job on stdin, messages on stdout, the engine in a file.

python -m cobra_edge.vision.engines.tensorrt_job < job.json
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .tensorrt_library import listener, tensorrt


class Job(msgspec.Struct, frozen=True):
    """What to build: the graph, the output directory, and the workspace limit of a kernel."""

    onnx: str
    directory: str
    workspace_bytes: int

    @property
    def plan(self) -> Path:
        """Path of the engine."""
        return Path(self.directory) / "plan"

    @property
    def timing(self) -> Path:
        """Path of the timing cache: read before the build, extended by it."""
        return Path(self.directory) / "timing"


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """The builder's current phase: `done` of `total` steps."""

    name: str
    done: int
    total: int


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """Why the build failed."""

    reason: str


Message = Phase | Failure
Say = Callable[[Message], bool]


def monitor(say: Say) -> Any:
    """Return a progress monitor that reports the outermost phases, and cancels the build once the parent is gone."""
    trt = tensorrt()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.heard = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            # There are thousands of inner phases.
            if parent_phase is None or len(self.steps) == 1:
                self.steps[phase_name] = num_steps
                self.heard = say(Phase(phase_name, 0, num_steps)) and self.heard

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self.heard = say(Phase(phase_name, step + 1, self.steps[phase_name])) and self.heard
            return self.heard

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def build(job: Job, say: Say) -> str | None:
    """Build the engine into `job.plan`, and write the extended timing cache to `job.timing`.

    Returns:
        Why the build failed, or None.
    """
    trt = tensorrt()
    logger = listener()
    builder = trt.Builder(logger)
    # Set if it exists: TensorRT 11 types every network strongly and ignores the flag, which may be removed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        problems = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return (
            f"TensorRT {trt.__version__} cannot parse {job.onnx} ({'; '.join(problems[:3])}); export the bundle with another "
            "--vision-precision, or run it with onnxruntime"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    # TF32 would round the matmuls of a float32 graph to 10 bits; all rounding is explicit in the graph.
    config.clear_flag(trt.BuilderFlag.TF32)
    timings = _timings(config, job.timing.read_bytes())
    watching = monitor(say)
    config.progress_monitor = watching
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        last = logger.heard[-1] if logger.heard else "no message"
        return (
            f"TensorRT {trt.__version__} could not build the engine ({last}); its workspace was limited to "
            f"{job.workspace_bytes / 1e9:.2f} GB: close other programs, or export with another --vision-precision"
        )
    job.plan.write_bytes(plan)
    job.timing.write_bytes(timings.serialize())
    return None


def _timings(config: Any, known: bytes) -> Any:
    """Set the timing cache of the configuration; start an empty one if TensorRT rejects the known one."""
    for content in (known, b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return timings
    raise RuntimeError("TensorRT rejects even an empty timing cache")


def main() -> None:
    """Read a job and run it; the last message is the failure, if there is one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which kills this process
    told = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # keeps libraries' output out of the messages

    def say(message: Message) -> bool:
        try:
            told.write(msgspec.json.encode(message) + b"\n")
        except OSError:
            return False
        return True

    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        reason = build(job, say)
    except OSError as error:
        reason = f"{job.directory}: the engine could not be written ({error})"
    if reason is not None:
        say(Failure(reason))


if __name__ == "__main__":
    main()
