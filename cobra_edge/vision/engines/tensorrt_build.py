"""Build the TensorRT engine of a bundle, once per key, in a child process.

The builder is native code that ignores signals, reports nothing for minutes and is the first that the kernel kills when memory
runs out. A child process can be killed at any moment, its exit is reported accurately, and its memory is free before the engine
is opened. It writes into a directory that is removed however the build ends; only complete engines are published.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

import msgspec

from ...bundle.engine_key import EngineKey
from ...bundle.reader import Bundle
from ...errors import BundleError, MachineError
from ...formats.precision import precision_named, why_no_gpu_of
from .cache import EngineCache, onnx_digest
from .device_buffers import Gpu, checked, first_gpu
from .tensorrt_job import Failure, Job, Message, Phase
from .tensorrt_library import tensorrt, why_no_tensorrt
from .tensorrt_memory import WEIGHT_COPIES, free_bytes, graph_bytes, why_too_little_memory, workspace_bytes

_DIGEST_BYTES = 32

Show = Callable[[str, int, int], None]
Stages = Callable[[], AbstractContextManager[Show]]


class BuiltEngine(msgspec.Struct, frozen=True):
    """An engine in the cache.

    Attributes:
        key: identifies library, GPU, precision and graph.
        file: its path.
        bytes: size of the file.
        seconds: build time; None if it was cached.
        workspace_bytes: workspace limit of its kernels; None if it was cached.
    """

    key: EngineKey
    file: str
    bytes: int
    seconds: float | None = None
    workspace_bytes: int | None = None


def engine_key(bundle: Bundle, gpu: Gpu) -> EngineKey:
    """Return the key of a bundle's engine, for the installed TensorRT and a GPU."""
    cuda = importlib.import_module("cuda.bindings.runtime")
    attribute = cuda.cudaDeviceAttr.cudaDevAttrMultiProcessorCount
    # All Jetson Orins share the name "Orin" and one compute capability, but kernels are chosen by timing them on one board.
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
    """Return why TensorRT cannot run a bundle's vision here, or None if it can, possibly after building the engine."""
    reason = why_no_tensorrt()
    if reason is not None:
        return reason
    gpu = first_gpu()
    reason = why_no_gpu_of(gpu.capability, precision_named(bundle.vision_graph.precision), gpu.name)
    if reason is not None or (cache or EngineCache()).has(engine_key(bundle, gpu)):
        return reason
    return why_too_little_memory(bundle, gpu)


def engine_of(
    bundle: Bundle, cache: EngineCache, stages: Stages, tell: Callable[[str], None], *, force: bool = False
) -> BuiltEngine:
    """Return the engine of a bundle's graph for this TensorRT and GPU; build it if the cache has none.

    Args:
        bundle: an open bundle with vision.
        cache: where engines are stored.
        stages: yields the progress function, called with a phase, the steps done and their total.
        tell: prints one line for the user.
        force: build it even if it is cached.

    Raises:
        BundleError: the bundle has no vision.
        MachineError: no TensorRT, no GPU, the wrong GPU, too little memory or disk space, or the builder failed.
    """
    if bundle.manifest.model.vision is None:
        raise BundleError(f"{bundle.directory}: {bundle.manifest.model.model_id} is a text-only model, it needs no engine")
    reason = refuses(bundle, cache)
    if reason is not None:
        raise MachineError(reason)
    gpu = first_gpu()
    key = engine_key(bundle, gpu)

    def found() -> BuiltEngine | None:
        data = cache.read(key)
        return None if data is None else BuiltEngine(key, str(cache.engine(key)), len(data))

    there = None if force else found()
    if there is not None:
        return there
    waited: list[bool] = []

    def wait() -> None:
        waited.append(True)
        tell("another process builds this engine; waiting for it")

    with cache.locked(key, wait):
        there = found() if waited or not force else None
        return there or _build(bundle, key, gpu, cache, stages, tell)


def _build(
    bundle: Bundle, key: EngineKey, gpu: Gpu, cache: EngineCache, stages: Stages, tell: Callable[[str], None]
) -> BuiltEngine:
    reason = why_too_little_memory(bundle, gpu)  # again: the previous holder of the lock may have used it
    if reason is not None:
        raise MachineError(reason)
    weights, disk = graph_bytes(bundle), shutil.disk_usage(cache.directory).free
    if disk < WEIGHT_COPIES * weights:
        raise MachineError(
            f"{cache.directory}: {disk / 1e9:.2f} GB free, about {WEIGHT_COPIES * weights / 1e9:.2f} GB needed for the engine; "
            "free some space, or give another directory with --cache"
        )
    tell(
        f"building the TensorRT engine for {gpu.name}: takes several minutes, mostly without progress while kernels are timed; "
        f"the engine is stored in {cache.directory}"
    )
    began, workspace = time.monotonic(), workspace_bytes(bundle, free_bytes(gpu))
    with cache.building(key) as directory:
        job = Job(str(bundle.graph_file().resolve()), str(directory.resolve()), workspace)
        timings = _timing_file(cache, key)
        job.timing.write_bytes(_read_timings(timings))
        with stages() as show:
            _run(job, show)
        data = job.plan.read_bytes()
        job.plan.unlink()  # frees the disk space of the second copy
        file = cache.publish(key, data)
        new = job.timing.read_bytes()
        cache.replace(timings, hashlib.sha256(new).digest() + new)
    return BuiltEngine(key, str(file), len(data), time.monotonic() - began, workspace)


def _timing_file(cache: EngineCache, key: EngineKey) -> Path:
    """Return the path of the timing cache: one per GPU and version, shared by all graphs."""
    digest = hashlib.sha256(key.gpu.encode()).hexdigest()[:16]
    return cache.directory / f"timings-{key.runtime}-{key.version}-sm{key.capabilities[0].replace('.', '')}-{digest}.cache"


def _read_timings(file: Path) -> bytes:
    """Return the timing cache, or nothing if it is missing or damaged: it only saves time."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    digest, timings = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return timings if hashlib.sha256(timings).digest() == digest else b""


def _run(job: Job, show: Show) -> None:
    """Run the build in a child process, which ends with this one, and show its progress. Raises MachineError if it fails."""
    with (Path(job.directory) / "stderr").open("w+b") as noise:
        child = subprocess.Popen(
            [sys.executable, "-m", "cobra_edge.vision.engines.tensorrt_job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            # CUDA then loads kernels on first use, which saves memory.
            env={"CUDA_MODULE_LOADING": "LAZY", **os.environ},
        )
        assert child.stdin is not None and child.stdout is not None
        failure = None
        try:
            with child.stdout as told:
                with suppress(BrokenPipeError), child.stdin as asked:  # the child exited early: its exit code is reported
                    asked.write(msgspec.json.encode(job))
                for line in told:
                    if not line.endswith(b"\n"):  # killed in the middle of a line
                        break
                    message = msgspec.json.decode(line, type=Message)
                    if isinstance(message, Phase):
                        show(message.name, message.done, message.total)
                    else:
                        failure = message
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if code != 0 or failure is not None:
            raise MachineError(_build_failure(code, failure, noise, job))


def _build_failure(code: int, failure: Failure | None, noise: IO[bytes], job: Job) -> str:
    """Return the message for a failed build."""
    if failure is not None:
        return failure.reason
    if code == -signal.SIGKILL:
        return (
            "the builder was killed, most likely because memory ran out (workspace was limited to "
            f"{job.workspace_bytes / 1e9:.2f} GB); close other programs, stop the desktop, or add swap"
        )
    noise.seek(0)
    lines = noise.read().decode(errors="replace").split("\n")
    last = next((text.strip() for text in reversed(lines) if text.strip()), "no message")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return f"the builder {how} ({last}); try another --vision-precision"
