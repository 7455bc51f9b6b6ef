"""The vision tower: one or two timm Vision Transformers, with the features of the second-to-last block concatenated.

The last block, the final norm and the pooling head are removed, because they are not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files.git_lfs import is_pointer, pointer_message
from ..formats.model_config import EncoderConfig, VisionConfig
from .backbones import featurizers
from .hub import fetch_encoder
from .timm_library import timm_library
from .weight_files import require_finite


class Encoder(nn.Module):
    """One ViT up to its second-to-last block."""

    def __init__(self, config: EncoderConfig, image_size: int, vit: nn.Module | None = None) -> None:
        """Wrap `vit`, or a newly initialized timm model of the config."""
        super().__init__()
        overrides: dict[str, Any] = dict(config.overrides)
        model: Any = vit or timm_library().create_model(config.timm_name, num_classes=0, img_size=image_size, **overrides)
        model.blocks = model.blocks[: config.depth - 1]
        for unused in ("norm", "fc_norm", "head_drop", "head"):
            setattr(model, unused, nn.Identity())
        model.attn_pool = None
        self.n_prefix = config.n_prefix
        self.vit = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalized pixels (batch, 3, size, size) float32 to patch features (batch, n_patches, embed_dim) float32."""
        vit: Any = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        for block in vit.blocks:
            x = block(x)
        return x[:, self.n_prefix :]


class VisionTower(nn.Module):
    """All encoders of a backbone."""

    def __init__(self, config: VisionConfig, encoders: Sequence[Encoder] | None = None) -> None:
        """Create the tower from existing encoders, or from new ones with random weights."""
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(encoders or [Encoder(e, config.image_size) for e in config.encoders])

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (batch, 3·n_encoders, size, size) float32, normalized for each encoder separately.

        Returns features (batch, n_patches, feature_dim) float32, encoders concatenated in order.
        """
        parts = [encoder(p) for encoder, p in zip(self.encoders, pixels.split(3, dim=1), strict=True)]
        return torch.cat(parts, dim=-1)


def load_tower(config: VisionConfig, weights: Path | None, tuned: Mapping[str, Tensor] | None = None) -> VisionTower:
    """Load the tower with pretrained weights.

    Args:
        config: the encoders.
        weights: directory with `<timm name>.safetensors` for each encoder, or None for timm's hub.
        tuned: tensors of fine-tuned encoders, of the encoders' shapes and any float dtype, with their featurizers' names; they
            take precedence.

    Raises:
        CheckpointError: a file or a tensor is missing or does not match.
        MachineError: the hub is unreachable.
    """
    if not tuned and weights is None:
        return _tower_from_hub(config)
    with torch.device("meta"):  # drawing random weights, to be replaced, takes longer than reading the true ones
        tower = VisionTower(config)
    for index, encoder in enumerate(config.encoders):
        where, tensors = _tensors_of(config, index, weights, tuned)
        _load_encoder(tower.encoders[index], where, tensors, encoder)
    return tower.eval()


def check_tower(config: VisionConfig, weights: Path | None, tuned: Mapping[str, Tensor] | None = None) -> None:
    """Check names, shapes and dtypes of the tensors that `load_tower` would load, without reading or downloading them.

    Raises:
        CheckpointError: see `load_tower`.
    """
    if not tuned and weights is None:
        _require_on_hub(config)
        return
    with torch.device("meta"):
        tower = VisionTower(config)
    for index, encoder in enumerate(config.encoders):
        where, tensors = _tensors_of(config, index, weights, tuned)
        _fitting(tower.encoders[index], where, tensors, encoder)


def encoder_file(config: VisionConfig, index: int) -> str:
    """Return the file name of an encoder's weights in a vision directory."""
    return f"{config.encoders[index].timm_name}.safetensors"


def _tensors_of(
    config: VisionConfig, index: int, weights: Path | None, tuned: Mapping[str, Tensor] | None
) -> tuple[str, dict[str, Tensor]]:
    """Return an encoder's tensors with timm's names, memory-mapped, and their origin, for messages."""
    if tuned:
        prefix = featurizers(config)[index]
        return f"vision_backbone, {prefix}*", {k[len(prefix) :]: v for k, v in tuned.items() if k.startswith(prefix)}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    assert weights is not None
    file = weights / encoder_file(config, index)
    if not file.is_file():
        raise CheckpointError(f"vision weights: {file.name} not found in {file.parent}; put the encoder's weights there")
    if is_pointer(file):
        raise CheckpointError(pointer_message(file))
    try:
        return file.name, load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error


def _fitting(encoder: nn.Module, where: str, tensors: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """Return the tensors that the encoder needs. Raises CheckpointError if some are missing or do not match."""
    vit: Any = encoder.vit
    wanted: dict[str, Tensor] = vit.state_dict()
    # A full timm checkpoint has the last block, final norm and pooling head, which are unused here.
    unused = (f"blocks.{config.depth - 1}.", "norm.", "fc_norm.", "head.", "attn_pool.", "mask_token")
    extra = [k for k in tensors if k not in wanted and not k.startswith(unused)]
    missing = [k for k in wanted if k not in tensors]
    if missing or extra:
        raise CheckpointError(f"{where}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    n_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    tensors["pos_embed"] = _resampled(tensors["pos_embed"], wanted["pos_embed"], n_prefix)
    for name, value in wanted.items():
        if tensors[name].shape != value.shape:
            raise CheckpointError(f"{where}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}")
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{where}: {name} has dtype {tensors[name].dtype}, expected a float type; save it as one")
    return {name: tensors[name] for name in wanted}


def _load_encoder(encoder: nn.Module, where: str, tensors: dict[str, Tensor], config: EncoderConfig) -> None:
    fitting = _fitting(encoder, where, tensors, config)
    vit: Any = encoder.vit
    dtypes = {name: value.dtype for name, value in vit.state_dict().items()}
    # Copies: a tensor of the wanted dtype is a view of its file.
    copied = {k: require_finite(f"{where}: {k}", v).to(dtypes[k], copy=True) for k, v in fitting.items()}
    vit.load_state_dict(copied, assign=True)
    assert not any(tensor.is_meta for tensor in (*vit.parameters(), *vit.buffers()))


def _resampled(positions: Tensor, wanted: Tensor, n_prefix: int) -> Tensor:
    """Resample position embeddings (1, n_prefix + side², embed_dim) to the wanted square grid, as timm does on loading.

    The published DINOv2 was trained at 518 px, the tower takes 384. Anything but a square grid of the wanted width is returned
    unchanged, and fails the shape check later.
    """
    if positions.ndim != 3 or positions.shape[1] < n_prefix or not positions.is_floating_point():
        return positions
    patches = [p.shape[1] - n_prefix for p in (positions, wanted)]
    sides = [math.isqrt(n) for n in patches]
    square = all(side * side == n for side, n in zip(sides, patches, strict=True))
    if not square or sides[0] < 2 or sides[0] == sides[1] or positions.shape[2] != wanted.shape[2]:
        return positions
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(positions, [sides[1]] * 2, [sides[0]] * 2, num_prefix_tokens=n_prefix)


def _require_on_hub(config: VisionConfig) -> None:
    for e in config.encoders:
        if not e.on_hub:
            raise CheckpointError(
                f"{config.backbone_id}: these encoders are not on a hub; give the directory of their safetensors with "
                "--vision-weights, or put it into the checkpoint as vision/"
            )


def _tower_from_hub(config: VisionConfig) -> VisionTower:
    _require_on_hub(config)
    vits = [fetch_encoder(e.timm_name, config.image_size, e.overrides) for e in config.encoders]
    encoders = [Encoder(e, config.image_size, vit) for e, vit in zip(config.encoders, vits, strict=True)]
    return VisionTower(config, encoders).eval()
