"""What this installation is made of, for `cobra-edge --version`: told without importing numpy, onnxruntime or torch."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path

from ..decode.cuda.library import image_names
from ..decode.native.library import kernel_names, why_not
from ..environment.source_commit import source_commit
from ..errors import MachineError
from ..version import __version__
from .requirements import base_requirements, installed_version

_PROVIDER_FILES = "libonnxruntime_providers_*.so"
_SHARED = "shared"  # what the provider libraries have in common


def version_text() -> str:
    """Return some lines: version, commit, kernels of the CPU and GPU decoders, execution providers, libraries."""
    reason, commit = why_not(), source_commit()
    rows = {
        "commit": commit or "unknown",
        "CPU kernels": reason or ", ".join(kernel_names()),
        "CUDA kernels": _cuda_kernels(),
        "providers": _providers(),
        "libraries": ", ".join(f"{r.name} {installed_version(r.name) or 'not installed'}" for r in base_requirements()),
        "Python": platform_text(),
    }
    return "\n".join([f"cobra-edge, version {__version__}", *(f"{name + ':':14}{text}" for name, text in rows.items())])


def platform_text() -> str:
    """Return the versions of Python and of the system, such as "3.11.2, Linux 6.1.0 x86_64"."""
    return f"{platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"


def _cuda_kernels() -> str:
    try:
        return ", ".join(image_names())
    except MachineError as error:
        return str(error)


def _providers() -> str:
    """Return onnxruntime's execution providers by the libraries in its package, which may not all load on this machine."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return "onnxruntime is not installed"
    files = [file for place in spec.submodule_search_locations for file in Path(place).glob(f"capi/{_PROVIDER_FILES}")]
    others = sorted(file.stem.removeprefix("libonnxruntime_providers_") for file in files)
    return ", ".join(["cpu", *(name for name in others if name != _SHARED)])
