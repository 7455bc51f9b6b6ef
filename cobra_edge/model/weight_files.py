"""Read the weight files of a checkpoint: pickles of torch and safetensors, memory-mapped, hostile until checked.

Pickles go through torch's weights-only reader, which runs no code. What comes out is plain dense tensors by part and name,
whatever a trainer put around them: a table inside another, names that a wrapper or a module of its own made longer.
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
# Where trainers keep the weights in a file of theirs: Cobra itself, most scripts, Lightning, DeepSpeed.
_CONTAINERS = ("model", "model_state_dict", "state_dict", "module")
# What wrappers put into the names of what they wrap: DDP and DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# A name up to where ours begin, for a model that is a member of the module that was saved.
_OUTER = re.compile(rf"((?:[^.]+\.)*?)(?:{'|'.join(PARTS)}|backbone|lm_head)\.")


def read_weights(*files: Path) -> dict[str, dict[str, Tensor]]:
    """Return {part: {name: tensor}}; files without parts are one part, llm_backbone."""
    parts: dict[str, dict[str, Tensor]] = {}
    for file in files:
        if is_pointer(file):
            raise CheckpointError(pointer_message(file))
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
        return _parts_of(file, load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: not a whole safetensors file ({error}); copy or download it again") from error


def _read_pickle(file: Path) -> dict[str, dict[str, Tensor]]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name}: refused, it is not a plain table of tensors and might run code when loaded{_named_global(error)}; "
            "only load checkpoints of known origin; a trainer's whole state: save its state_dict alone, best as safetensors"
        ) from error
    except PermissionError:
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
                raise CheckpointError(f"{file.name}: expected {{'{container}': {{part: {{name: tensor}}}}}}, or names at once")
            return {part: _unwrapped(file, tensors) for part, tensors in data.items()}
    if not _is_table(data):
        raise CheckpointError(f"{file.name}: expected a table of tensors by name, got {type(data).__name__}")
    return _parts_of(file, data)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _named_global(error: Exception) -> str:
    """Name what the pickle wanted to call, where torch says it."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it calls {found[1]})" if found else ""


def _is_table(data: object) -> bool:
    return isinstance(data, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items())


def _unwrapped(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names they had before anything was wrapped around their modules."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise CheckpointError(f"{file.name}: two tensors are {short} once wrappers' names are left out; save one of them")
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
    """Return the tensor, of any shape and dtype, as it is; raise InputError naming it when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged or training diverged")
    return tensor
