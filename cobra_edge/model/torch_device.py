"""Where the float model runs: this machine's processor, or an NVIDIA GPU that torch can use."""

from __future__ import annotations

import torch

from ..errors import MachineError


def torch_device(name: str) -> torch.device:
    """Return torch's device for "cpu" or "cuda", the first GPU.

    Raises:
        MachineError: torch can use no GPU here; the reason is said.
    """
    if name == "cuda" and not torch.cuda.is_available():
        built = f"this torch ({torch.__version__}) was built without CUDA; install one with it"
        unseen = "torch sees no NVIDIA GPU; nvidia-smi says what the driver sees"
        raise MachineError(f"--device cuda: {built if torch.version.cuda is None else unseen}; or take --device cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)
