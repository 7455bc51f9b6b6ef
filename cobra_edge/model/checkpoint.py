"""Open a checkpoint: the original run directory, the same as safetensors, a hub name, or a bare text-only Mamba.

Tensors stay memory-mapped until they are used. All sizes are read off the tensors and then checked against what the config
says, so a config that lies and a file that lacks a tensor are both found before any work begins. Files are hostile until
checked: pickles are read with torch's weights-only reader, which runs no code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError, InputError, MachineError, near_matches
from .config import (
    HUB_MODELS,
    HUB_REPOSITORY,
    LANGUAGE_BACKBONES,
    CobraConfig,
    MambaConfig,
    decoder_shapes,
    projector_kind,
    projector_shapes,
    vision_backbone,
)

log = logging.getLogger(__name__)

MINI = "mini"
MINI_DIRECTORY = Path(__file__).parent.parent / "mini"
_WEIGHTS = ("checkpoints/latest-checkpoint.safetensors", "checkpoints/latest-checkpoint.pt")
_BARE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SHARD_INDEX = "model.safetensors.index.json"
_CONFIG_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint whose tensors fit its config.

    Attributes:
        source_id: what a manifest calls it.
        config: the whole architecture.
        decoder: tensors under state-spaces names (see `decoder_shapes`), memory-mapped, any float dtype.
        projector: tensors of the projector; empty for a text-only model.
        files: files the weights came from, for hashing.
        vision_weights: directory of encoder weights, or None for timm's hub.
        tokenizer: tokenizer.json, or None where it has to come from the hub.
        tokenizer_hub_id: hub repository of the tokenizer.
    """

    source_id: str
    config: CobraConfig
    decoder: dict[str, Tensor]
    projector: dict[str, Tensor]
    files: tuple[Path, ...]
    vision_weights: Path | None = None
    tokenizer: Path | None = None
    tokenizer_hub_id: str | None = None
    _digest: list[str] = field(default_factory=list)

    def sha256(self) -> str:
        """Return the hash over weights, local encoders and tokenizer, read once; encoders from timm's hub are not in it."""
        if not self._digest:
            digest = hashlib.sha256()
            encoders = sorted(self.vision_weights.glob("*.safetensors")) if self.vision_weights else []
            for file in (*self.files, *encoders, *([self.tokenizer] if self.tokenizer else [])):
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 24):
                        digest.update(chunk)
            self._digest.append(digest.hexdigest())
        return self._digest[0]

    def tokenizer_file(self) -> Path:
        """Return tokenizer.json, fetched from the hub where the checkpoint has none.

        Raises:
            CheckpointError: no tokenizer is known. MachineError: the hub cannot be reached.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.tokenizer_hub_id is None:
            raise CheckpointError(f"{self.source_id}: no tokenizer.json beside the config; give one with --tokenizer")
        return _download(self.tokenizer_hub_id, "tokenizer.json")


def open_checkpoint(source: str, *, vision_weights: Path | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Open `source`: "mini", a registry name of the hub, or a directory.

    Args:
        source: what to open.
        vision_weights: directory of encoder weights; by default `vision/` of the directory, else timm's hub.
        tokenizer: tokenizer.json; by default the directory's own, else the hub's.

    Raises:
        CheckpointError: missing, corrupt, hostile, or not fitting its config.
        MachineError: the hub is needed and cannot be reached.
    """
    if source == MINI:
        checkpoint = _open_directory(MINI_DIRECTORY, "cobra-mini")
    elif source in HUB_MODELS:
        checkpoint = _open_hub(source)
    elif Path(source).is_dir():
        checkpoint = _open_directory(Path(source), Path(source).resolve().name)
    else:
        raise CheckpointError(
            f"checkpoint {source!r} is neither a directory nor a known name{near_matches(source, (MINI, *HUB_MODELS))}"
        )
    for given, name in ((vision_weights, "--vision-weights"), (tokenizer, "--tokenizer")):
        if given is not None and not given.exists():
            raise CheckpointError(f"{name} {given} does not exist")
    return replace(
        checkpoint,
        vision_weights=vision_weights or checkpoint.vision_weights,
        tokenizer=tokenizer or checkpoint.tokenizer,
    )


def _open_hub(name: str) -> Checkpoint:
    config = _download(HUB_REPOSITORY, f"{name}/config.json")
    weights = _download(HUB_REPOSITORY, f"{name}/checkpoints/latest-checkpoint.pt")
    return _run_directory(name, _read_json(config), weights)


def _download(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub client raises a dozen types for "no network" and "no such file"
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise MachineError(
            f"{file} of {repository} could not be fetched from the hub and is not in its cache "
            f"({type(error).__name__}: {reason}); connect once, or download the run directory and pass its path"
        ) from error


def _open_directory(directory: Path, source_id: str) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{directory}: no config.json; expected a Cobra run directory or a Mamba model directory")
    config = _read_json(config_file)
    is_cobra = "model" in config
    names = _WEIGHTS if is_cobra else _BARE_WEIGHTS
    whole = [directory / n for n in names if (directory / n).is_file()]
    weights = tuple(whole[:1]) or (() if is_cobra else _shards(directory))
    if not weights:
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(names)}")
    opened = _run_directory(source_id, config, weights[0]) if is_cobra else _bare_mamba(source_id, config, weights)
    vision, tokenizer = directory / "vision", directory / "tokenizer.json"
    return replace(
        opened,
        vision_weights=vision if vision.is_dir() else None,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def _shards(directory: Path) -> tuple[Path, ...]:
    """Return the files that a transformers index lists; none where there is no index."""
    index = directory / _SHARD_INDEX
    if not index.is_file():
        return ()
    table = _read_json(index).get("weight_map")
    names = sorted({str(n) for n in table.values()}) if isinstance(table, dict) else []
    odd = [n for n in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", n)]
    if not names or odd:
        raise CheckpointError(f"{index}: its weight_map names {odd or 'nothing'}, expected safetensors files beside it")
    absent = [n for n in names if not (directory / n).is_file()]
    if absent:
        raise CheckpointError(f"{directory}: {', '.join(absent)} missing, {_SHARD_INDEX} names it; download it again")
    return tuple(directory / n for n in names)


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _CONFIG_LIMIT_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, too large for a config")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("model", {}), dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return data


def _run_directory(source_id: str, config: dict[str, Any], weights: Path) -> Checkpoint:
    model = config["model"]
    keys = ("arch_specifier", "vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
    missing = [k for k in keys if not isinstance(model.get(k), str)]
    if missing:
        raise CheckpointError(f"config.json: model lacks {', '.join(missing)}")
    vision, kind = vision_backbone(model["vision_backbone_id"]), projector_kind(model["arch_specifier"])
    llm_id = model["llm_backbone_id"]
    if llm_id not in LANGUAGE_BACKBONES:
        raise CheckpointError(f"unknown llm_backbone_id {llm_id!r}{near_matches(llm_id, LANGUAGE_BACKBONES)}")
    promised = LANGUAGE_BACKBONES[llm_id]

    parts = _read_weights(weights)
    decoder = {k.removeprefix("llm."): v for k, v in parts.pop("llm_backbone", {}).items()}
    projector = parts.pop("projector", {})
    parts.pop("vision_backbone", None)  # some fine-tuned runs carry it; encoders come from their own files
    if parts:
        raise CheckpointError(f"{weights.name}: unexpected parts {sorted(parts)}, expected projector and llm_backbone")
    mamba = _infer_mamba(decoder, weights.name)
    if (mamba.d_model, mamba.n_layer) != (promised.d_model, promised.n_layer):
        raise CheckpointError(
            f"{weights.name}: tensors are those of a Mamba with d_model {mamba.d_model} and {mamba.n_layer} layers, "
            f"config.json says {llm_id} with {promised.d_model} and {promised.n_layer}"
        )
    _check_shapes(projector, projector_shapes(kind, vision.feature_dim, mamba.d_model), f"{weights.name}, projector")
    length = model.get("llm_max_length", 2048)
    if type(length) is not int:
        raise CheckpointError(f"config.json: llm_max_length is {length!r}, expected an integer")
    cobra = CobraConfig(
        model_id=str(model.get("model_id", source_id)),
        vision=vision,
        projector=kind,
        mamba=mamba,
        image_resize_strategy=model["image_resize_strategy"],
        prompt_style=promised.prompt_style,
        max_length=length,
    )
    return Checkpoint(source_id, cobra, decoder, projector, (weights,), tokenizer_hub_id=promised.tokenizer_hub_id)


def _bare_mamba(source_id: str, config: dict[str, Any], weights: tuple[Path, ...]) -> Checkpoint:
    """Open a text-only Mamba in the state-spaces or the transformers layout; names differ in one place."""
    tensors, file = _read_weights(*weights).get("llm_backbone", {}), weights[0].name
    decoder = {k.replace("backbone.embeddings.", "backbone.embedding."): v for k, v in tensors.items()}
    eps = config.get("layer_norm_epsilon", 1e-5)
    mamba = _infer_mamba(decoder, file, float(eps) if isinstance(eps, int | float) else 1e-5)
    same = {
        "hidden_size": "d_model",
        "d_model": "d_model",
        "num_hidden_layers": "n_layer",
        "n_layer": "n_layer",
        "state_size": "d_state",
        "intermediate_size": "d_inner",
        "time_step_rank": "dt_rank",
        "conv_kernel": "d_conv",
    }
    for key, name in same.items():
        if isinstance(config.get(key), int) and config[key] != getattr(mamba, name):
            raise CheckpointError(f"config.json says {key} {config[key]}, the tensors of {file} say {getattr(mamba, name)}")
    model_id = re.sub(r"[^A-Za-z0-9._+-]+", "-", source_id).lstrip("._+-")[:128] or "mamba"
    cobra = CobraConfig(model_id, None, None, mamba, prompt_style="base")
    return Checkpoint(source_id, cobra, decoder, {}, weights, tokenizer_hub_id="EleutherAI/gpt-neox-20b")


def _read_weights(*files: Path) -> dict[str, dict[str, Tensor]]:
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

    try:
        return _parts_of(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: not a whole safetensors file ({error})") from error


def _read_pickle(file: Path) -> dict[str, dict[str, Tensor]]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.name}: refused, it is not a plain table of tensors and might run code when loaded "
            f"({_first_line(error)}); only load checkpoints of known origin, best as safetensors"
        ) from error
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


def _infer_mamba(decoder: dict[str, Tensor], file: str, norm_eps: float = 1e-5) -> MambaConfig:
    """Read all sizes off the tensors, then demand that every tensor is there and fits."""
    layers = [int(m.group(1)) for k in decoder if (m := re.match(r"backbone\.layers\.(\d{1,4})\.", k))]
    embedding = decoder.get("backbone.embedding.weight")
    first = "backbone.layers.0.mixer."
    needed = [first + n for n in ("A_log", "conv1d.weight", "dt_proj.weight")]
    absent = [n for n in needed if n not in decoder or decoder[n].ndim < 2]
    if embedding is None or embedding.ndim != 2 or absent:
        lacking = absent or ["backbone.embedding.weight"]
        raise CheckpointError(f"{file}: not a Mamba-1 decoder, tensor {lacking[0]} is missing or has the wrong rank")
    head = decoder.get("lm_head.weight")
    config = MambaConfig(
        d_model=embedding.shape[1],
        n_layer=max(layers) + 1,
        vocab=embedding.shape[0],
        d_inner=decoder[needed[0]].shape[0],
        d_state=decoder[needed[0]].shape[1],
        d_conv=decoder[needed[1]].shape[-1],
        dt_rank=decoder[needed[2]].shape[1],
        norm_eps=norm_eps,
        tied=head is None or (head.shape == embedding.shape and torch.equal(head, embedding)),
    )
    shapes = decoder_shapes(config)
    if config.tied:
        decoder.pop("lm_head.weight", None)
    _check_shapes(decoder, shapes, file)
    return config


def _check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], where: str) -> None:
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"{what} {', '.join(n[:4])}{' …' if len(n) > 4 else ''}" for what, n in
                 (("missing", missing), ("unexpected", extra)) if n]  # fmt: skip
        raise CheckpointError(f"{where}: {'; '.join(parts)}; is this checkpoint of the model that its config names?")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {name} has dtype {tensor.dtype}, expected a float type")


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor; raise InputError naming it when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged or training diverged")
    return tensor
