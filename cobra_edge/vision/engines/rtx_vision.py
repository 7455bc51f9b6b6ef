"""Select the TensorRT for RTX engine of a bundle: the bundle's own, or one rebuilt for this GPU."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...bundle.engine_key import EngineKey
from ...bundle.reader import VISION, Bundle
from .cache import EngineCache, onnx_digest
from .device_buffers import Gpu, first_gpu, why_no_cuda
from .rtx_runner import RtxVision
from .tensorrt_rtx import (
    RUNTIME,
    build_engine,
    library_version,
    supported_capabilities,
    why_no_precision,
    why_no_tensorrt_rtx,
    why_not_installed,
    why_too_little_memory,
)
from .weight_stripping import restore_weights

log = logging.getLogger(__name__)


def refuses(bundle: Bundle) -> str | None:
    """Return why TensorRT for RTX cannot run a bundle's vision here, or None if it can."""
    # Cheap checks first: loading the library takes a good part of a second.
    if not any(key.runtime == RUNTIME for key in bundle.manifest.engines.values()):
        return "the bundle was exported without an engine of TensorRT for RTX (--target rtx)"
    reason = why_not_installed() or why_no_cuda() or why_no_tensorrt_rtx()
    if reason is not None:
        return reason
    gpu = first_gpu()
    if gpu.capability not in supported_capabilities():
        return (
            f"TensorRT for RTX {library_version()} does not support {gpu.name} (compute capability {gpu.capability}), "
            f"it supports {', '.join(supported_capabilities())}"
        )
    engine, key = _fitting(bundle, gpu), wanted_key(bundle, gpu)
    if isinstance(engine, str) and not EngineCache().has(key):
        short = why_no_precision(key.precision, key.capabilities) or why_too_little_memory(bundle.path(VISION))
        if short is not None:
            return f"{engine}; {short}"
    return None


def wanted_key(bundle: Bundle, gpu: Gpu) -> EngineKey:
    """Return the key of the engine that the installed library would build for this bundle and this GPU only."""
    precision = bundle.vision_graph.precision
    return EngineKey(RUNTIME, library_version(), (gpu.capability,), precision, onnx_digest(bundle.graph_files))


def why_not_this(key: EngineKey, bundle: Bundle, gpu: Gpu) -> str | None:
    """Return why an engine does not match this library, GPU and graph, or None if it does."""
    wanted = wanted_key(bundle, gpu)
    if key.version != wanted.version:
        return f"the bundle's engine was built by TensorRT for RTX {key.version}, {wanted.version} is installed"
    if gpu.capability not in key.capabilities:
        built = ", ".join(key.capabilities)
        return f"the bundle's engine is for compute capability {built}, {gpu.name} has {gpu.capability}"
    if key.precision != wanted.precision:
        return f"the bundle's engine computes in {key.precision}, its graph in {wanted.precision}"
    if key.onnx_sha256 != wanted.onnx_sha256:
        return "the bundle's engine was built from another graph than its vision.onnx"
    return None


def open_engine(bundle: Bundle) -> RtxVision:
    """Open the bundle's engine, or one from the user's cache, building it if necessary; the reason is logged.

    Raises:
        MachineError: the engine cannot be opened on the GPU, or there is too little memory or disk space.
        BundleError: the bundle's engine does not match the manifest.
        InputError: none can be built.
    """
    gpu = first_gpu()
    fitting = _fitting(bundle, gpu)
    if not isinstance(fitting, str):
        name, key = fitting
        if key.stripped:
            files = {f: bundle.path(f) for f in bundle.graph_files}
            return RtxVision(restore_weights(bundle.path(name), files), key, bundle, gpu)
        with _mapped(bundle.path(name)) as mapped:
            return RtxVision(mapped, key, bundle, gpu)
    log.warning("vision: %s; another is taken from the cache, or built once", fitting)
    key, cache = wanted_key(bundle, gpu), EngineCache()
    with cache.locked(key, lambda: log.warning("vision: another process builds this engine; waiting for it")):
        data = cache.read(key)
        if data is None:
            with cache.building(key) as scratch:
                build_engine(bundle.graph_file(), scratch / "engine", key.precision, key.capabilities, key.onnx_sha256)
                data = (scratch / "engine").read_bytes()
            cache.publish(key, data)
    return RtxVision(data, key, bundle, gpu)


def _fitting(bundle: Bundle, gpu: Gpu) -> tuple[str, EngineKey] | str:
    """Return name and key of a matching engine of the bundle, or why the last one does not match."""
    reason = "the bundle has no engine of TensorRT for RTX"
    for name, key in bundle.manifest.engines.items():
        if key.runtime != RUNTIME:
            continue
        why = why_not_this(key, bundle, gpu) if name in bundle.manifest.files else f"{name!r} is not among the bundle's files"
        if why is None:
            return name, key
        reason = why
    return reason


@contextmanager
def _mapped(file: Path) -> Iterator[memoryview]:
    """Yield a file's bytes, memory-mapped; an empty file cannot be mapped."""
    if not file.stat().st_size:
        yield memoryview(b"")
        return
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view
