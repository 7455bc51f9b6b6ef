"""TensorRT as JetPack installs it: whether it can be used, and its logger."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

from .device_buffers import why_no_cuda

VERSION_MIN = (10, 3)
HOW_TO_GET = (
    "on a Jetson it comes with JetPack 6.1 or later (sudo apt install nvidia-jetpack; a virtual environment sees it when made "
    "with --system-site-packages), or use a container of export/containers"
)


def tensorrt() -> Any:
    """Import NVIDIA's module; it is available if `why_no_tensorrt` returns None."""
    return importlib.import_module("tensorrt")


def why_no_tensorrt() -> str | None:
    """Return why TensorRT cannot be used here, or None if it can."""
    if importlib.util.find_spec("tensorrt") is None:
        return f"TensorRT is not installed; {HOW_TO_GET}"
    try:
        version = str(tensorrt().__version__)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"TensorRT is installed but cannot be loaded ({error}); {HOW_TO_GET}"
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < VERSION_MIN:
        return f"TensorRT is {version}, {VERSION_MIN[0]}.{VERSION_MIN[1]} or later is needed; {HOW_TO_GET}"
    return why_no_cuda()


def listener() -> Any:
    """Return a logger for TensorRT that collects errors and warnings in `.heard` and prints nothing."""
    trt = tensorrt()

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.heard: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.heard.append(message)

    return Listener()
