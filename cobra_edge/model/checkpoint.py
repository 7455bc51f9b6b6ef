"""Open a checkpoint: an original run directory, the same as safetensors, a hub name, or a text-only Mamba.

Tensors are memory-mapped. All sizes are inferred from the tensors and compared with the config, so that a wrong config or a
missing tensor is found before any work begins.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bundle.manifest import VisionSource
from ..errors import CheckpointError
from ..files.git_lfs import is_pointer, pointer_message
from ..files.parsing import utf8_text
from ..formats.model_config import CobraConfig, MambaConfig, projector_kind, projector_shapes
from ..formats.package_data import MINI
from ..terminal.suggestions import near_matches
from .backbones import (
    HUB_MODELS,
    HUB_REPOSITORY,
    ONLY_MAMBA_1,
    TRAINING_CONFIGURATIONS,
    featurizers,
    language_backbone,
    vision_backbone,
)
from .decoder_tensors import check_shapes, infer_mamba, plain_names
from .hub import fetch
from .weight_files import read_weights

log = logging.getLogger(__name__)

EMBEDDED = "mini"  # the name of the included model
_WEIGHTS = ("checkpoints/latest-checkpoint.safetensors", "checkpoints/latest-checkpoint.pt")
_BARE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_SHARD_INDEX = "model.safetensors.index.json"
_CONFIG_LIMIT_BYTES = 1 << 20
_SIZES = ("d_model", "n_layer", "vocab", "d_inner", "d_state", "d_conv", "dt_rank")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint whose tensors match its config.

    Attributes:
        source_id: its name in a manifest.
        config: the complete architecture.
        decoder: tensors with state-spaces names (see `decoder_shapes`), memory-mapped, any float dtype.
        projector: tensors of the projector; empty for a text-only model.
        files: the weight files, for hashing.
        tower: tensors of fine-tuned encoders, with their featurizers' names; empty if there are none.
        vision_weights: directory of encoder weights; None if `tower` has them or they come from timm's hub.
        tokenizer: tokenizer.json, or None if it comes from the hub.
        tokenizer_hub_id: hub repository of the tokenizer.
        stage: training stage, if the config has it: "align", "finetune" or "full-finetune".
    """

    source_id: str
    config: CobraConfig
    decoder: dict[str, Tensor]
    projector: dict[str, Tensor]
    files: tuple[Path, ...]
    tower: dict[str, Tensor] = field(default_factory=dict)
    vision_weights: Path | None = None
    tokenizer: Path | None = None
    tokenizer_hub_id: str | None = None
    stage: str | None = None
    _digest: list[str] = field(default_factory=list, init=False, repr=False)  # cached

    @property
    def vision_source(self) -> VisionSource | None:
        """Source of the encoder weights; None for a text-only model."""
        if self.config.vision is None:
            return None
        return "checkpoint" if self.tower else "files" if self.vision_weights else "hub"

    def hashed_files(self) -> list[Path]:
        """Return the files covered by `sha256`: weights, local encoders, tokenizer; not encoders from timm's hub."""
        encoders = sorted(self.vision_weights.glob("*.safetensors")) if self.vision_weights else []
        return [*self.files, *encoders, *([self.tokenizer] if self.tokenizer else [])]

    def sha256(self, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Return the hash over `hashed_files`, cached; on_bytes is called with the size of each chunk, for progress."""
        if self._digest:
            return self._digest[0]
        digest = hashlib.sha256()
        for file in self.hashed_files():
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
                    on_bytes(len(chunk))
        self._digest.append(digest.hexdigest())
        return self._digest[0]

    def tokenizer_file(self) -> Path:
        """Return tokenizer.json, downloaded from the hub if the checkpoint has none.

        Raises:
            CheckpointError: no tokenizer is known. MachineError: the hub is unreachable.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        if self.tokenizer_hub_id is None:
            raise CheckpointError(
                f"{self.source_id}: no tokenizer.json next to the config; give one, or its directory, with --tokenizer"
            )
        return fetch(self.tokenizer_hub_id, "tokenizer.json", "give the file, or its directory, with --tokenizer")


def open_checkpoint(source: str, *, vision_weights: Path | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Open `source`: "mini", a registry name of the hub, or a directory.

    Args:
        source: what to open.
        vision_weights: directory of encoder weights; by default those in the checkpoint, if the encoders were fine-tuned,
            else `vision/` of the directory, else timm's hub.
        tokenizer: tokenizer.json or a directory that has it; by default the checkpoint's, else the hub's.

    Raises:
        CheckpointError: missing, corrupt, hostile, or inconsistent with its config.
        MachineError: the hub is needed and unreachable.
    """
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    for given, name in ((vision_weights, "--vision-weights"), (tokenizer, "--tokenizer")):
        if given is not None and not given.exists():
            raise CheckpointError(f"{name} {given} does not exist")
    if vision_weights is not None and not vision_weights.is_dir():
        raise CheckpointError(f"--vision-weights {vision_weights} is a file; give the directory of the encoders' safetensors")
    if source == EMBEDDED:
        checkpoint = _open_directory(MINI, "cobra-mini")
    elif source in HUB_MODELS:
        checkpoint = _open_hub(HUB_MODELS[source])
    elif Path(source).is_dir():
        checkpoint = _open_directory(Path(source), Path(source).resolve().name)
    else:
        raise CheckpointError(_unknown(source))
    tokenizer = tokenizer or checkpoint.tokenizer
    if tokenizer is not None and is_pointer(tokenizer):
        raise CheckpointError(pointer_message(tokenizer))
    tower = {} if vision_weights else checkpoint.tower
    vision_weights = None if tower else vision_weights or checkpoint.vision_weights
    checkpoint = replace(checkpoint, tower=tower, vision_weights=vision_weights, tokenizer=tokenizer)
    if checkpoint.stage == "full-finetune" and checkpoint.vision_source == "hub":
        log.warning(
            "%s: config.json says stage full-finetune, but the checkpoint has no vision_backbone: without fine-tuned encoders "
            "answers get worse; give them with --vision-weights",
            source,
        )
    return checkpoint


def _unknown(source: str) -> str:
    """Return the error message for a source that cannot be opened."""
    if source in TRAINING_CONFIGURATIONS:
        return (
            f"checkpoint {source!r} is a training configuration of Cobra's code, which offers no weights for it to download "
            f"(only {', '.join(map(repr, HUB_MODELS))}); give the directory of a run that was trained with it"
        )
    if Path(source).is_file():
        return f"checkpoint {source} is a file; give the run directory, which has config.json and checkpoints/"
    return f"checkpoint {source!r} is neither a directory nor a known name{near_matches(source, (EMBEDDED, *HUB_MODELS))}"


def _open_hub(name: str) -> Checkpoint:
    otherwise = "download the run directory and pass its path"
    config = fetch(HUB_REPOSITORY, f"{name}/config.json", otherwise)
    weights = fetch(HUB_REPOSITORY, f"{name}/checkpoints/latest-checkpoint.pt", otherwise)
    return _run_directory(name, _read_json(config), weights)


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
        hint = "; sharded .bin files: save them as safetensors" if any(directory.glob("pytorch_model-*.bin")) else ""
        steps = sorted(f.name for f in (directory / "checkpoints").glob("*.pt")) if is_cobra else []
        hint = f"; link or copy the one you want, such as {steps[-1]}, to that name" if steps else hint
        raise CheckpointError(f"{directory}: no weights; expected {' or '.join(names)}{hint}")
    opened = _run_directory(source_id, config, weights[0]) if is_cobra else _bare_mamba(source_id, config, weights)
    vision, tokenizer = directory / "vision", directory / "tokenizer.json"
    return replace(
        opened,
        vision_weights=vision if vision.is_dir() else None,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def _shards(directory: Path) -> tuple[Path, ...]:
    """Return the files listed in a transformers index; none without an index."""
    index = directory / _SHARD_INDEX
    if not index.is_file():
        return ()
    table = _read_json(index).get("weight_map")
    names = sorted({str(n) for n in table.values()}) if isinstance(table, dict) else []
    odd = [n for n in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", n)]
    if not names or odd:
        raise CheckpointError(f"{index}: its weight_map names {odd or 'nothing'}, expected safetensors files next to it")
    absent = [n for n in names if not (directory / n).is_file()]
    if absent:
        raise CheckpointError(f"{directory}: {', '.join(absent)} missing, listed in {_SHARD_INDEX}; download it again")
    return tuple(directory / n for n in names)


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _CONFIG_LIMIT_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes, too large for a config")
    try:
        data = json.loads(utf8_text(file.read_bytes()))
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
    vision = vision_backbone(model["vision_backbone_id"], model["image_resize_strategy"])
    kind = projector_kind(model["arch_specifier"])
    llm_id = model["llm_backbone_id"]
    promised = language_backbone(llm_id)

    parts = read_weights(weights)
    decoder = plain_names(parts.pop("llm_backbone", {}))
    projector, tower = parts.pop("projector", {}), parts.pop("vision_backbone", {})
    if parts:
        raise CheckpointError(f"{weights.name}: unexpected parts {sorted(parts)}, expected projector and llm_backbone")
    if projector and not decoder:
        raise CheckpointError(
            f"{weights.name}: only a projector, as after stage align, without a language model; use the run directory of "
            "stage finetune or full-finetune that started from it"
        )
    odd = [name for name in tower if not name.startswith(tuple(featurizers(vision)))]
    if odd:
        raise CheckpointError(
            f"{weights.name}: vision_backbone has {odd[0]}, expected names that begin with {' or '.join(featurizers(vision))} "
            f"for {vision.backbone_id}; does the config belong to this checkpoint?"
        )
    mamba = infer_mamba(decoder, weights.name)
    differing = [n for n in _SIZES if getattr(mamba, n) != getattr(promised.mamba, n)]
    if differing:
        got, wanted = (", ".join(f"{n} {getattr(m, n)}" for n in differing) for m in (mamba, promised.mamba))
        raise CheckpointError(
            f"{weights.name}: its tensors have {got}; config.json says {llm_id}, which has {wanted}; "
            "correct llm_backbone_id, or use the config of this checkpoint"
        )
    check_shapes(projector, projector_shapes(kind, vision.feature_dim, mamba.d_model), f"{weights.name}, projector")
    length = model.get("llm_max_length", 2048)
    if type(length) is not int:
        raise CheckpointError(f"config.json: llm_max_length is {length!r}, expected an integer")
    cobra = CobraConfig(
        model_id=str(model["model_id"]) if "model_id" in model else _as_model_id(source_id),
        vision=vision,
        projector=kind,
        mamba=mamba,
        image_resize_strategy=model["image_resize_strategy"],
        prompt_style=promised.prompt_style,
        max_length=length,
    )
    hub_id, stage = promised.tokenizer_hub_id, config.get("stage")
    return Checkpoint(source_id, cobra, decoder, projector, (weights,), tower, tokenizer_hub_id=hub_id, stage=stage)


def _bare_mamba(source_id: str, config: dict[str, Any], weights: tuple[Path, ...]) -> Checkpoint:
    """Open a text-only Mamba in the state-spaces or the transformers layout."""
    _check_bare_choices(config)
    decoder, file = plain_names(read_weights(*weights).get("llm_backbone", {})), weights[0].name
    eps = config.get("layer_norm_epsilon", 1e-5)
    mamba = infer_mamba(decoder, file, float(eps) if isinstance(eps, int | float) else 1e-5)
    _check_bare_sizes(config, mamba, file)
    cobra = CobraConfig(_as_model_id(source_id), None, None, mamba, prompt_style="base")
    return Checkpoint(source_id, cobra, decoder, {}, weights, tokenizer_hub_id="EleutherAI/gpt-neox-20b")


# Names of the sizes in a text-only Mamba's config.json: transformers', state-spaces', and those inside its ssm_cfg.
_BARE_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "state_size": "d_state",
    "intermediate_size": "d_inner",
    "time_step_rank": "dt_rank",
    "conv_kernel": "d_conv",
    "n_layer": "n_layer",
} | {name: name for name in ("d_model", "d_state", "d_conv", "dt_rank")}
# Properties of a supported decoder that its tensors do not show.
_BARE_CHOICES = {"model_type": "mamba", "hidden_act": "silu", "layer": "Mamba1"}


def _said(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("ssm_cfg")
    return config | (inner if isinstance(inner, dict) else {})


def _check_bare_choices(config: dict[str, Any]) -> None:
    said = _said(config)
    for key, expected in _BARE_CHOICES.items():
        if said.get(key, expected) != expected:
            raise CheckpointError(
                f"config.json says {key} {said[key]!r}, expected {expected!r}: not a published Mamba-1; {ONLY_MAMBA_1}"
            )


def _check_bare_sizes(config: dict[str, Any], mamba: MambaConfig, file: str) -> None:
    said = _said(config)
    sizes = {key: (said.get(key), getattr(mamba, name)) for key, name in _BARE_NAMES.items()}
    vocab, multiple = said.get("vocab_size"), said.get("pad_vocab_size_multiple", 1)
    if type(vocab) is int and type(multiple) is int and multiple > 0:
        sizes["vocab_size"] = (-(-vocab // multiple) * multiple, mamba.vocab)
    for key, (written, found) in sizes.items():
        if type(written) is int and written != found:
            raise CheckpointError(
                f"config.json says {key} {written}, the tensors of {file} say {found}; use the config of this checkpoint"
            )


def _as_model_id(directory_name: str) -> str:
    """Return a directory name as a valid model_id."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", directory_name).lstrip("._+-")[:128] or "mamba"
