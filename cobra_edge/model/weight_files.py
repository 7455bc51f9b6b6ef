"""Read the weight files of a checkpoint: torch pickles and safetensors, memory-mapped, untrusted until checked.

Pickles are loaded with torch's `weights_only`, which runs no code. The result is plain dense tensors by part and name, whatever
the trainer's layout: nested dicts, and names with the prefixes of wrappers or of an outer module.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..files.git_lfs import is_pointer, pointer_message

PARTS = ("projector", "llm_backbone", "vision_backbone")
# Keys under which trainers store the weights: Cobra itself, most scripts, Lightning, DeepSpeed.
_CONTAINERS = ("model", "model_state_dict", "state_dict", "module")
# Name components added by wrappers: DDP and DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The prefix of names if the model is a member of the saved module.
_OUTER = re.compile(rf"((?:[^.]+\.)*?)(?:{'|'.join(PARTS)}|backbone|lm_head)\.")


def read_weights(*files: Path) -> dict[str, dict[str, Tensor]]:
    """Return {part: {name: tensor}}, tensors of any shape and dtype; files without parts are one part, llm_backbone."""
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        if is_pointer(file):
            raise CheckpointError(pointer_message(file))
        for part, tensors in (_read_safetensors if file.suffix == ".safetensors" else _read_pickle)(file).items():
            parts.setdefault(part, {}).update(tensors)
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
            if not plain or not tensor.is_contiguous():  # an expanded tensor claims more values than the file has
                raise CheckpointError(f"{files[0].name}: {part}.{name} is not a plain dense tensor; save it as one")
    return parts


def _read_safetensors(file: Path) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    file.open("rb").close()  # the library reports an unreadable file as missing
    try:
        return _parts_of(file, load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: not a complete safetensors file ({error}); copy or download it again") from error


def _read_pickle(file: Path) -> dict[str, dict[str, Tensor]]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name}: refused, it contains more than tensors and might run code when loaded{_named_global(error)}; "
            "only load checkpoints of known origin; of a trainer's state save only the state_dict, preferably as safetensors"
        ) from error
    except (PermissionError, MemoryError):  # not the fault of the file
        raise
    except Exception as error:  # a damaged pickle can make the reader raise anything
        raise CheckpointError(
            f"{file.name}: truncated, corrupt or not a zip-format torch file ({_first_line(error)}); download it again"
        ) from error
    container = next((k for k in _CONTAINERS if isinstance(data, dict) and isinstance(data.get(k), dict)), None)
    if container is not None:
        data = data[container]
        if not _is_table(data):
            if not all(isinstance(name, str) and _is_table(part) for name, part in data.items()):
                raise CheckpointError(
                    f"{file.name}: expected {{'{container}': {{part: {{name: tensor}}}}}}, or {{name: tensor}} there"
                )
            return {part: _unwrapped(file, tensors) for part, tensors in data.items()}
    if not _is_table(data):
        raise CheckpointError(f"{file.name}: expected a dict of tensors by name, got {type(data).__name__}")
    return _parts_of(file, data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _named_global(error: Exception) -> str:
    """Return the function that the pickle would call, if torch names it."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it calls {found[1]})" if found else ""


def _is_table(data: object) -> bool:
    return isinstance(data, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())


def _unwrapped(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the name components of wrappers removed."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise CheckpointError(f"{file.name}: two tensors are named {short} without wrappers' prefixes; save one of them")
        plain[short] = tensor
    return plain


def _parts_of(file: Path, flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    flat = _unwrapped(file, flat)
    outer = next((found[1] for name in flat if (found := _OUTER.match(name))), "")
    for name, tensor in flat.items():
        part, _, rest = name.removeprefix(outer).partition(".")
        if part in PARTS:
            parts.setdefault(part, {})[rest] = tensor
        else:
            parts.setdefault("llm_backbone", {})[name.removeprefix(outer)] = tensor
    return parts


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, of any shape and dtype, unchanged. Raises InputError with its name if it contains NaN or infinity."""
    # The extremes take one pass, without a mask; NaN is one wherever it occurs.
    if tensor.numel() and not all(torch.isfinite(value) for value in tensor.aminmax()):
        raise InputError(f"{name}: contains NaN or infinity; the checkpoint is damaged or training diverged")
    return tensor
