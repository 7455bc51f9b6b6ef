"""Where torch runs: this machine's processor or an NVIDIA GPU, and why it can use no GPU here.

Importable without torch, which is imported when it is asked; of a GPU only where there is an NVIDIA driver.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

from ..environment.nvidia_driver import driver_cuda, why_no_driver
from ..environment.requirements import install_hint
from ..errors import MachineError

if TYPE_CHECKING:
    import torch


def torch_device(name: str) -> torch.device:
    """Return torch's device for "cpu" or "cuda", the first GPU.

    Raises:
        MachineError: torch can use no GPU here; the reason is said.
    """
    reason = why_no_torch_gpu() if name == "cuda" else None
    if reason is not None:
        raise MachineError(f"--device cuda: {reason}; or take --device cpu")
    import torch

    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@cache
def why_no_torch_gpu() -> str | None:
    """Return why torch can use no GPU here, with what is needed; None where it can."""
    reason = why_no_driver()
    if reason is not None:
        return reason
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed ({install_hint('export')})"
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA; install one with it"
    known = driver_cuda()
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
