"""Checks of the vision runtimes."""

from __future__ import annotations

import importlib.util

from .check import Check


class RuntimeCheck(Check, frozen=True, kw_only=True):
    """A vision runtime.

    Attributes:
        version: None if it cannot be loaded.
        providers: onnxruntime's execution providers, best first; empty of other runtimes.
    """

    version: str | None = None
    providers: tuple[str, ...] = ()


def check_onnxruntime() -> RuntimeCheck:
    """Check which execution providers the installed onnxruntime has."""
    if importlib.util.find_spec("onnxruntime") is None:
        return RuntimeCheck(verdict="missing", text="not installed; nothing runs vision: pip install onnxruntime")
    try:
        import onnxruntime

        from ..vision.providers import eligible
    except (ImportError, OSError) as error:
        return RuntimeCheck(verdict="missing", text=f"cannot be loaded ({error}); install it again")
    version, providers = str(onnxruntime.__version__), tuple(p.title for p in eligible("auto")[0])
    return RuntimeCheck(text=f"{version}: {', '.join(providers)}", version=version, providers=providers)


def check_tensorrt() -> RuntimeCheck:
    """Check TensorRT as JetPack installs it."""
    from ..vision.engines.tensorrt_library import tensorrt, why_no_tensorrt

    reason = why_no_tensorrt()
    if reason is not None:
        return RuntimeCheck(verdict="missing", text=reason)
    version = str(tensorrt().__version__)
    return RuntimeCheck(text=version, version=version)


def check_tensorrt_rtx() -> RuntimeCheck:
    """Check TensorRT for RTX."""
    from ..vision.engines.device_buffers import first_gpu, why_no_cuda
    from ..vision.engines.tensorrt_rtx import library_version, supported_capabilities, why_no_tensorrt_rtx, why_not_installed

    reason = why_not_installed() or why_no_cuda() or why_no_tensorrt_rtx()
    if reason is not None:
        return RuntimeCheck(verdict="missing", text=reason)
    version, gpu, capabilities = library_version(), first_gpu(), supported_capabilities()
    if gpu.capability not in capabilities:
        text = f"{version} does not support {gpu.name} ({gpu.capability}), it supports {', '.join(capabilities)}"
        return RuntimeCheck(verdict="missing", text=text, version=version)
    return RuntimeCheck(text=version, version=version)
