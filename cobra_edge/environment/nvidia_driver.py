"""The NVIDIA driver of this machine: whether it is there, and which CUDA it knows."""

from __future__ import annotations

import ctypes

_DRIVER = "libcuda.so.1"


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
