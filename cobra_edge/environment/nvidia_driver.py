"""The NVIDIA driver of this machine: whether it is there, and which CUDA it knows."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_DRIVER = "libcuda.so.1"
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def why_no_driver() -> str | None:
    """Return why nothing here can speak to an NVIDIA GPU, or None. Imports nothing."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({_DRIVER} cannot be loaded); an NVIDIA GPU and its driver are needed"
    return None


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver knows, such as (12, 6); None if it does not say. Only with a driver."""
    version = ctypes.c_int(0)
    if ctypes.CDLL(_DRIVER).cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_release() -> str | None:
    """Return the release of the driver's kernel module, such as "550.54.15"; None if the system does not say."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", _KERNEL_MODULE.read_text(errors="replace"))
    except OSError:
        return None
    return None if found is None else found[1]
