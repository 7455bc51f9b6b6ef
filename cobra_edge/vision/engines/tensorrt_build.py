"""Building the TensorRT engine of a bundle: once for each key, whoever asks, in a process of its own.

The builder is native code that hears no signal, says nothing for minutes and is what the kernel kills first where memory runs
out. As a child it can be ended at any moment, its end is told as what it was, and its memory is free again before the engine
is opened. It writes into a directory that is removed however the build ends; only whole engines are published.
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
        key: what it was built from and for.
        file: where it is.
        bytes: its size.
        seconds: how long it took to build; None where it was there already.
        workspace_bytes: memory that its kernels may take beside weights and activations; None where it was there already.
    """

    key: EngineKey
    file: str
    bytes: int
    seconds: float | None = None
    workspace_bytes: int | None = None


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
    """Return the engine of a bundle's graph for this TensorRT and GPU, built where the cache has no whole one.

    Args:
        bundle: an opened bundle with vision.
        cache: where engines are kept.
        stages: gives a function that shows the progress, told a name, how much is done, and of what.
        tell: says one line to the user.
        force: build it even if it is there.

    Raises:
        BundleError: the bundle has no vision. MachineError: no TensorRT, no GPU, the wrong GPU, too little memory or disk, or
            the builder failed.
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
    reason = why_too_little_memory(bundle, gpu)  # again: whoever held the lock may have needed it
    if reason is not None:
        raise MachineError(reason)
    weights, disk = graph_bytes(bundle), shutil.disk_usage(cache.directory).free
    if disk < WEIGHT_COPIES * weights:
        raise MachineError(
            f"{cache.directory}: {disk / 1e9:.2f} GB free, about {WEIGHT_COPIES * weights / 1e9:.2f} GB needed for the engine; "
            "free some space, or give another directory with --cache"
        )
    tell(
        f"building the TensorRT engine for {gpu.name}: several minutes, most of them silent while kernels are timed on it; "
        f"the engine is kept in {cache.directory}"
    )
    began, workspace = time.monotonic(), workspace_bytes(bundle, free_bytes(gpu))
    with cache.building(key) as directory:
        job = Job(str(bundle.graph_file().resolve()), str(directory.resolve()), workspace)
        timings = _timing_file(cache, key)
        job.timing.write_bytes(_read_timings(timings))
        with stages() as show:
            _run(job, show)
        data = job.plan.read_bytes()
        job.plan.unlink()  # the disk need not hold it twice
        file = cache.publish(key, data)
        new = job.timing.read_bytes()
        cache.replace(timings, hashlib.sha256(new).digest() + new)
    return BuiltEngine(key, str(file), len(data), time.monotonic() - began, workspace)


def _timing_file(cache: EngineCache, key: EngineKey) -> Path:
    """Return where measured times of kernels lie: those of one GPU and version serve all graphs."""
    digest = hashlib.sha256(key.gpu.encode()).hexdigest()[:16]
    return cache.directory / f"timings-{key.runtime}-{key.version}-sm{key.capabilities[0].replace('.', '')}-{digest}.cache"


def _read_timings(file: Path) -> bytes:
    """Return what was measured before, nothing where that is missing or damaged: it saves time and is worth no failure."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    digest, timings = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return timings if hashlib.sha256(timings).digest() == digest else b""


def _run(job: Job, show: Show) -> None:
    """Let a child build, and show what it reports. Raises MachineError where it fails; it ends when this ends."""
    with (Path(job.directory) / "stderr").open("w+b") as noise:
        child = subprocess.Popen(
            [sys.executable, "-m", "cobra_edge.vision.engines.tensorrt_job"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            # CUDA loads kernels when they are used, which saves memory.
            env={"CUDA_MODULE_LOADING": "LAZY", **os.environ},
        )
        assert child.stdin is not None and child.stdout is not None
        failure = None
        try:
            with child.stdout as told:
                with suppress(BrokenPipeError), child.stdin as asked:  # it ended before it was asked: its code tells
                    asked.write(msgspec.json.encode(job))
                for line in told:
                    if not line.endswith(b"\n"):  # it was ended in the middle of one
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
            raise MachineError(_epitaph(code, failure, noise, job))


def _epitaph(code: int, failure: Failure | None, noise: IO[bytes], job: Job) -> str:
    """Say why there is no engine."""
    if failure is not None:
        return failure.reason
    if code == -signal.SIGKILL:
        return (
            "the builder was killed, as the kernel does where memory runs out (workspace was limited to "
            f"{job.workspace_bytes / 1e9:.2f} GB); close other programs, stop the desktop, or add swap"
        )
    noise.seek(0)
    lines = noise.read().decode(errors="replace").split("\n")
    last = next((text.strip() for text in reversed(lines) if text.strip()), "it said nothing")
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"the builder {how} ({last}); the engine can also be tried with another --vision-precision"
