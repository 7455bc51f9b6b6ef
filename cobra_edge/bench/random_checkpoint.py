"""Checkpoints with random weights in published shapes, written as original run directories.

Sizes are exact. Some channels of the norms and of D are large, as they are in trained Mambas: outliers in the inputs of in_proj
and out_proj, whose mean square stays 1.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from ..formats.model_config import decoder_shapes, projector_kind, projector_shapes
from ..formats.package_data import MINI
from ..model.backbones import vision_backbone
from ..model.vision import Encoder, encoder_file
from .shapes import shape_named

OUTLIERS = 0.03  # share of channels
OUTLIER_GAINS = (20.0, 60.0)


def write_random_checkpoint(shape: str, directory: Path, on_part: Callable[[], None] = lambda: None) -> None:
    """Write a run directory of random bfloat16 weights in a published shape, with encoder weights and a tokenizer.

    Args:
        shape: a published shape.
        directory: to write; must not exist.
        on_part: called after the decoder and after each encoder, for progress.

    Raises:
        InputError: an unknown shape.
    """
    named = shape_named(shape)
    mamba, vision = named.mamba, vision_backbone(named.vision_backbone_id)
    (directory / "checkpoints").mkdir(parents=True)
    config = {
        "model_id": f"{shape}-random",
        **named._asdict(),
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
    }
    (directory / "config.json").write_text(json.dumps({"model": config}, indent=2))
    shutil.copyfile(MINI / "tokenizer.json", directory / "tokenizer.json")
    random = torch.Generator().manual_seed(0)
    decoder = {f"llm.{k}": _random(k, s, random) for k, s in decoder_shapes(mamba).items()}
    # A token that the tokenizer does not have would be an answer without text.
    decoder["llm.backbone.embedding.weight"][_tokens(directory / "tokenizer.json") :] = 0
    decoder["llm.lm_head.weight"] = decoder["llm.backbone.embedding.weight"]
    shapes = projector_shapes(projector_kind(named.arch_specifier), vision.feature_dim, mamba.d_model)
    projector = {k: _random(k, s, random) for k, s in shapes.items()}
    parts = {"projector": projector, "llm_backbone": decoder}
    torch.save({"model": parts}, directory / "checkpoints" / "latest-checkpoint.pt")
    del parts, decoder, projector
    on_part()
    (directory / "vision").mkdir()
    for index, encoder in enumerate(vision.encoders):
        torch.manual_seed(index)
        weights = Encoder(encoder, vision.image_size).vit.state_dict()
        save_file(weights, directory / "vision" / encoder_file(vision, index))
        on_part()


def _tokens(tokenizer: Path) -> int:
    return Tokenizer.from_file(str(tokenizer)).get_vocab_size()


def outlier_gains(width: int, share: float, random: torch.Generator) -> torch.Tensor:
    """Return gains (width,) float32: log-uniform in OUTLIER_GAINS for a share of the channels, 1 for the others."""
    gains, (low, high) = torch.ones(width), map(math.log, OUTLIER_GAINS)
    chosen = torch.randperm(width, generator=random)[: round(share * width)]
    gains[chosen] = torch.exp(low + (high - low) * torch.rand(len(chosen), generator=random))
    return gains


def _random(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Return bfloat16 values of this shape that keep a deep decoder stable."""
    if name.endswith("A_log"):
        return torch.log(torch.arange(1.0, shape[1] + 1)).repeat(shape[0], 1).bfloat16()
    if name.endswith("norm_f.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith(("norm.weight", "mixer.D")):
        gains = outlier_gains(shape[0], OUTLIERS, random)
        return (gains / gains.square().mean().sqrt()).bfloat16()
    values = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=random)
    return values.mul_(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
