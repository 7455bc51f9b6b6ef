"""Whether there is a GPU that a decoder can use. torch is imported only where there is an NVIDIA driver."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

from ...environment.requirements import install_hint

if TYPE_CHECKING:
    import torch

_DRIVER = "libcuda.so.1"
# What Triton supports: float16 and bfloat16 tensor cores, copies that run beside products.
LEAST_CAPABILITY = (8, 0)


def why_no_driver() -> str | None:
    """Return why nothing here can speak to an NVIDIA GPU, or None. Imports nothing."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return f"there is no NVIDIA driver ({_DRIVER} cannot be loaded); a GPU and its driver are needed"
    return None


@cache
def why_no_torch_gpu() -> str | None:
    """Return why torch can use no GPU here, with what is needed; None where it can."""
    reason = why_no_driver()
    if reason is not None:
        return reason
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed ({install_hint('triton')})"
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA; install one with it ({install_hint('triton')})"
    known = _driver_cuda()
    if known is not None and known[0] < int(torch.version.cuda.split(".")[0]):
        return (
            f"the NVIDIA driver is too old: it knows CUDA {known[0]}.{known[1]}, this torch ({torch.__version__}) needs "
            f"{torch.version.cuda}; update the driver, or install a torch for CUDA {known[0]}"
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        return f"there is a driver, but torch sees no CUDA GPU{hint}; nvidia-smi says what the driver sees"
    return None


def why_too_old(least: tuple[int, int] = LEAST_CAPABILITY) -> str | None:
    """Return why the first GPU's compute capability is not enough, or None. Only where `why_no_torch_gpu` is None."""
    import torch

    has = torch.cuda.get_device_capability(0)
    if has >= least:
        return None
    return (
        f"{torch.cuda.get_device_name(0)} has compute capability {has[0]}.{has[1]}, {least[0]}.{least[1]} or later is needed "
        "(Ampere: A100, RTX 30, Orin)"
    )


def why_no_triton() -> str | None:
    """Return why Triton's kernels cannot run on the first GPU, or None. Only where `why_no_torch_gpu` is None."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed ({install_hint('triton')})"
    return why_too_old()


def why_no_torch_kernels() -> str | None:
    """Return why torch's own kernels cannot run on the first GPU, or None. Only where `why_no_torch_gpu` is None."""
    import torch

    built_for = [int(arch.removeprefix("sm_").rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    major, minor = torch.cuda.get_device_capability(0)
    # A kernel runs on its own capability and on later ones of the same major version.
    if any(arch // 10 == major and arch % 10 <= minor for arch in built_for):
        return None
    return (
        f"this torch ({torch.__version__}) has no kernels for {torch.cuda.get_device_name(0)}, compute capability "
        f"{major}.{minor}, only for {', '.join(f'{a // 10}.{a % 10}' for a in built_for)}"
    )


def gpu_title(device: torch.device) -> str:
    """Return what a person calls a GPU, with its compute capability; of what is no GPU, its type."""
    import torch

    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver knows; None where it does not say."""
    version = ctypes.c_int(0)
    if ctypes.CDLL(_DRIVER).cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
