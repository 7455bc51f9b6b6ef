"""Stage vision: both encoders learn to predict content and position of each patch, at the features that the decoder uses.

It replaces the pretraining of DINOv2 and SigLIP, which is out of reach on two cores.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra_edge.formats.model_config import VisionConfig
from cobra_edge.model.backbones import vision_backbone
from cobra_edge.model.vision import VisionTower

from .scenes import COLOURS, SHAPES, SIZE, Scene, render

VISION = vision_backbone("dinosiglip-vit-mini-112px")
GRID = SIZE // 14


def pixels_of(scenes: list[Scene], vision: VisionConfig = VISION) -> Tensor:
    """Return (batch, 3·n_encoders, SIZE, SIZE) float32: three channels for each encoder, normalised its way."""
    raw = torch.from_numpy(np.stack([np.asarray(render(s)) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    parts = [(raw - torch.tensor(e.mean).view(3, 1, 1)) / torch.tensor(e.std).view(3, 1, 1) for e in vision.encoders]
    return torch.cat(parts, dim=1)


HEAD_SIZES = {
    "here": 2,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": 2,
    "cover": len(COLOURS) + 1,
    "cover_shape": len(SHAPES),
    "row": GRID,
    "column": GRID,
    "centre": 2,
}


def patch_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return the labels of each patch, (batch, GRID²) int64: -100 where a label does not apply.

    here: whether an object's centre lies in the patch; shape, colour, size and centre (batch, GRID², 2) float32 (x and y in
    patches from the patch's corner, NaN elsewhere) are of that object. cover and cover_shape: colour (0 is background) and
    shape of the object that covers the middle of the patch. row and column: the patch's own position, wherever there is an
    object; with features that do not encode position the decoder would have to count patches, and never learns left from right.
    """
    n = len(scenes)
    labels = {k: np.full((n, GRID * GRID), -100, np.int64) for k in HEAD_SIZES if k != "centre"}
    labels["here"][:], labels["cover"][:] = 0, 0
    centre = np.full((n, GRID * GRID, 2), np.nan, np.float32)
    middles = (np.arange(GRID) + 0.5) * 14
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            patch = int(thing.y // 14) * GRID + int(thing.x // 14)
            shape, colour = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
            labels["here"][i, patch], labels["shape"][i, patch], labels["colour"][i, patch] = 1, shape, colour
            labels["size"][i, patch] = int(thing.size == "large")
            centre[i, patch] = thing.x % 14 / 14, thing.y % 14 / 14
            near = np.hypot(middles[None, :] - thing.x, middles[:, None] - thing.y) < 0.8 * thing.radius
            labels["cover"][i, near.reshape(-1)] = colour + 1
            labels["cover_shape"][i, near.reshape(-1)] = shape
    occupied = (labels["here"] == 1) | (labels["cover"] > 0)
    patches = np.arange(GRID * GRID)
    labels["row"] = np.where(occupied, patches // GRID, -100)
    labels["column"] = np.where(occupied, patches % GRID, -100)
    return {k: torch.from_numpy(v) for k, v in labels.items()} | {"centre": torch.from_numpy(centre)}


def vision_loss(tower: VisionTower, heads: nn.ModuleList, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
    """Return the mean loss of both encoders, a scalar, and for each the accuracies of attributes, positions and centres."""
    labels, pixels = patch_labels(scenes), pixels_of(scenes)
    total, right = torch.zeros(()), {}
    for name, encoder, head, part in zip(("dino", "siglip"), tower.encoders, heads, pixels.split(3, dim=1), strict=True):
        out = dict(zip(HEAD_SIZES, head(encoder(part)).float().split(list(HEAD_SIZES.values()), dim=-1), strict=True))
        for label in ("shape", "colour", "size", "cover", "cover_shape", "row", "column"):
            total = total + F.cross_entropy(out[label].flatten(0, 1), labels[label].flatten(), ignore_index=-100)
        rare = torch.tensor([1.0, 4.0])  # few patches hold a centre
        total = total + 2 * F.cross_entropy(out["here"].flatten(0, 1), labels["here"].flatten(), weight=rare)
        here = labels["here"] == 1
        total = total + 2 * F.mse_loss(out["centre"][here], labels["centre"][here])
        ok = out["shape"].argmax(-1)[here] == labels["shape"][here]
        ok &= out["colour"].argmax(-1)[here] == labels["colour"][here]
        placed = out["row"].argmax(-1)[here] == labels["row"][here]
        placed &= out["column"].argmax(-1)[here] == labels["column"][here]
        right[f"{name}_placed"] = float(placed.float().mean())
        right[f"{name}_named"] = float(ok.float().mean())
        right[f"{name}_found"] = float(((out["here"].argmax(-1) == 1) == here).all(dim=1).float().mean())
    return total / len(tower.encoders), right
