"""The vision tower: one or two timm Vision Transformers, features of the second-to-last block, concatenated.

Blocks after the one whose output is used, the final norm and the pooling head are removed: they never run, and a device
should not carry them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import EncoderConfig, VisionConfig
from .hub import fetch_encoder
from .weight_files import require_finite


class Encoder(nn.Module):
    """One ViT up to its second-to-last block."""

    def __init__(self, config: EncoderConfig, image_size: int, vit: nn.Module | None = None) -> None:
        """Wrap `vit`, or a freshly initialised timm model of the config."""
        super().__init__()
        overrides: dict[str, Any] = dict(config.overrides)
        model: Any = vit or timm.create_model(config.timm_name, num_classes=0, img_size=image_size, **overrides)
        model.blocks = model.blocks[: config.depth - 1]
        for unused in ("norm", "fc_norm", "head_drop", "head"):
            setattr(model, unused, nn.Identity())
        model.attn_pool = None
        self.n_prefix = config.n_prefix
        self.vit = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (batch, 3, size, size); returns patch features (batch, n_patches, embed_dim)."""
        vit: Any = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels))))
        for block in vit.blocks:
            x = block(x)
        return x[:, self.n_prefix :]


class VisionTower(nn.Module):
    """All encoders of a backbone."""

    def __init__(self, config: VisionConfig, encoders: Sequence[Encoder] | None = None) -> None:
        """Make the tower of ready encoders, or of fresh ones with random weights."""
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList(encoders or [Encoder(e, config.image_size) for e in config.encoders])

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (batch, 3·n_encoders, size, size), each encoder's three channels normalised its own way.

        Returns features (batch, n_patches, feature_dim), encoders concatenated in order.
        """
        parts = [encoder(p) for encoder, p in zip(self.encoders, pixels.split(3, dim=1), strict=True)]
        return torch.cat(parts, dim=-1)


def load_tower(config: VisionConfig, weights: Path | None) -> VisionTower:
    """Return the tower with pretrained weights.

    Args:
        config: which encoders.
        weights: a directory with `<timm name>.safetensors` for each encoder, or None for timm's hub.

    Raises:
        CheckpointError: a file is missing or does not fit.
        MachineError: the hub cannot be reached.
    """
    if weights is None:
        return _tower_from_hub(config)
    tower = VisionTower(config)
    for index, encoder in enumerate(config.encoders):
        _load_encoder(tower.encoders[index], weights / encoder_file(config, index), encoder)
    return tower.eval()


def encoder_file(config: VisionConfig, index: int) -> str:
    """Return the file name of an encoder's weights in a vision directory."""
    return f"{config.encoders[index].timm_name}.safetensors"


def _load_encoder(encoder: nn.Module, file: Path, config: EncoderConfig) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"vision weights: {file.name} not found in {file.parent}; put the encoder's weights there")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    vit: Any = encoder.vit
    wanted = vit.state_dict()
    # The last block, final norm and pooling head are part of a full timm checkpoint and never run here.
    unused = (f"blocks.{config.depth - 1}.", "norm.", "fc_norm.", "head.", "attn_pool.", "mask_token")
    extra = [k for k in tensors if k not in wanted and not k.startswith(unused)]
    missing = [k for k in wanted if k not in tensors]
    if missing or extra:
        raise CheckpointError(f"{file.name}: missing tensors {missing[:5]}, unexpected tensors {extra[:5]}")
    tensors["pos_embed"] = _resampled(tensors["pos_embed"], wanted["pos_embed"])
    for name, value in wanted.items():
        require_finite(f"{file.name}: {name}", tensors[name])
        if tensors[name].shape != value.shape:
            raise CheckpointError(f"{file.name}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}")
    vit.load_state_dict({k: tensors[k].to(v.dtype) for k, v in wanted.items()})


def _resampled(positions: Tensor, wanted: Tensor) -> Tensor:
    """Bring position embeddings (1, side², embed_dim) to the wanted square grid, as timm does when it loads a model itself.

    The published DINOv2 was trained at 518 px, the tower reads 384. What is no square grid of the wanted width is returned
    as it is, for the shape check to refuse.
    """
    sides = [math.isqrt(p.shape[1]) if p.ndim == 3 else 0 for p in (positions, wanted)]
    square = all(s * s == p.shape[1] for s, p in zip(sides, (positions, wanted), strict=True) if p.ndim == 3)
    if positions.ndim != 3 or not square or sides[0] < 2 or sides[0] == sides[1] or positions.shape[2] != wanted.shape[2]:
        return positions
    return resample_abs_pos_embed(positions, [sides[1]] * 2, [sides[0]] * 2, num_prefix_tokens=0)


def _tower_from_hub(config: VisionConfig) -> VisionTower:
    encoders = []
    for e in config.encoders:
        if e.overrides:
            raise CheckpointError(f"{config.backbone_id}: these encoders are on no hub; give a directory of vision weights")
        vit = fetch_encoder(e.timm_name, config.image_size)
        encoders.append(Encoder(e, config.image_size, vit))
    return VisionTower(config, encoders).eval()
