"""Read the weight files of a checkpoint: pickles of torch and safetensors, memory-mapped, hostile until checked.

Pickles go through torch's weights-only reader, which runs no code. What comes out is plain dense tensors by part and name.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError


def read_weights(*files: Path) -> dict[str, dict[str, Tensor]]:
    """Return {part: {name: tensor}}; files without parts are one part, llm_backbone."""
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for part, tensors in (_read_safetensors if file.suffix == ".safetensors" else _read_pickle)(file).items():
            parts.setdefault(part, {}).update(tensors)
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
            if not plain or not tensor.is_contiguous():  # an expanded tensor claims more values than the file holds
                raise CheckpointError(f"{files[0].name}: {part}.{name} is not a plain dense tensor; save it as one")
    return parts


def _read_safetensors(file: Path) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    file.open("rb").close()  # the library says of a file it may not read that it is not there
    try:
        return _parts_of(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: not a whole safetensors file ({error}); copy or download it again") from error


def _read_pickle(file: Path) -> dict[str, dict[str, Tensor]]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name}: refused, it is not a plain table of tensors and might run code when loaded{_named_global(error)}; "
            "only load checkpoints of known origin, best as safetensors"
        ) from error
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise CheckpointError(
            f"{file.name}: truncated, corrupt or not a zip-format torch file ({_first_line(error)}); download it again"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        parts = data["model"]
        if not all(isinstance(name, str) and _is_table(part) for name, part in parts.items()):
            raise CheckpointError(f"{file.name}: expected {{'model': {{part: {{name: tensor}}}}}}")
        return dict(parts)
    if not _is_table(data):
        raise CheckpointError(f"{file.name}: expected a table of tensors by name, got {type(data).__name__}")
    return _parts_of(data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _named_global(error: Exception) -> str:
    """Name what the pickle wanted to call, where torch says it."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it calls {found[1]})" if found else ""


def _is_table(data: object) -> bool:
    return isinstance(data, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())


def _parts_of(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        part, _, rest = name.partition(".")
        if part in ("projector", "llm_backbone", "vision_backbone"):
            parts.setdefault(part, {})[rest] = tensor
        else:
            parts.setdefault("llm_backbone", {})[name] = tensor
    return parts


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, of any shape and dtype, as it is; raise InputError naming it when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged or training diverged")
    return tensor
