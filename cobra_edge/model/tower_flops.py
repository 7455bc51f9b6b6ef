"""The floating-point operations of a vision tower."""

from __future__ import annotations

import math

import torch

from ..formats.model_config import CobraConfig, projector_shapes
from .vision import VisionTower


def tower_flops(config: CobraConfig) -> int:
    """Return the floating-point operations of the matmuls of one image; a multiply-accumulate counts as two.

    Encoders: the patch embedding, the linear layers of each block on all tokens, and the two matmuls of attention.
    Projector: its linear layers on all patches, and the convolution of LDPv2 on the tokens it returns.

    Args:
        config: of a model with vision.
    """
    assert config.vision is not None and config.projector is not None
    with torch.device("meta"):
        encoders = VisionTower(config.vision).encoders
    patches, total = config.vision.n_patches, 0
    for e, encoder in zip(config.vision.encoders, encoders, strict=True):
        tokens = patches + e.n_prefix
        matrices = sum(p.numel() for name, p in encoder.named_parameters() if ".blocks." in name and p.ndim == 2)
        total += patches * 3 * e.patch_size**2 * e.embed_dim
        total += tokens * matrices + (e.depth - 1) * 2 * tokens**2 * e.embed_dim
    for name, size in projector_shapes(config.projector, config.vision.feature_dim, config.mamba.d_model).items():
        if name.endswith(".weight"):
            total += math.prod(size) * (config.n_visual_tokens if ".peg." in name else patches)
    return 2 * total
