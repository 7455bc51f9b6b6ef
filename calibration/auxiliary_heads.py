"""Auxiliary heads for stage language: the residual stream must predict an object at the word that completes its name.

The answer to "Is the red circle left of the blue square?" is one bit, which depends on the relation of two objects that must be
found first; that bit alone teaches nothing for thousands of steps. So at every name in a question, heads predict whether there
is such an object, its attributes, its column and its row; and at the second name, on which side of it the first one lies. The
heads are small and linear, and are discarded after training.
Source: deep supervision (Lee et al. 2015), here at words instead of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra_edge.model.mamba import Mamba

from .scenes import COLOURS, SHAPES, SIZE, Scene, Thing

BINS = 16  # columns and rows, each of SIZE / BINS = 7 pixels
ABOUT_ONE = {"there": 2, "colour": len(COLOURS), "shape": len(SHAPES), "size": 2, "column": BINS, "row": BINS}
ABOUT_TWO = {"across": 2, "down": 2}
IGNORED = -100  # ignore_index of torch's losses
_MIN_OFFSET = 4.0  # pixels; nearer centres are neither left nor right
_NAME = re.compile(rf"\b(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}|object)\b")


@dataclass(frozen=True)
class Mention:
    """A name in a question: the character it ends at, and its labels by head, IGNORED if one does not apply."""

    end: int
    labels: dict[str, int]


def mentions(scene: Scene, prompt: str) -> Iterator[Mention]:
    """Yield every name of one object in a question about the scene, in order; plurals are not names."""
    first: Thing | None = None
    for name in _NAME.finditer(prompt):
        meant = [t for t in scene.things if _fits(t, name["colour"], name["shape"])]
        labels = dict.fromkeys((*ABOUT_ONE, *ABOUT_TWO), IGNORED) | {"there": int(bool(meant))}
        if len(meant) == 1:
            labels |= _about_one(meant[0])
            if first is not None:
                labels |= _about_two(first, meant[0])
            first = first or meant[0]
        yield Mention(name.end(), labels)


def _fits(thing: Thing, colour: str | None, shape: str) -> bool:
    return colour in (None, thing.colour) and shape in ("object", thing.shape)


def _about_one(thing: Thing) -> dict[str, int]:
    return {
        "colour": list(COLOURS).index(thing.colour),
        "shape": SHAPES.index(thing.shape),
        "size": int(thing.size == "large"),
        "column": int(thing.x * BINS / SIZE),
        "row": int(thing.y * BINS / SIZE),
    }


def _about_two(first: Thing, second: Thing) -> dict[str, int]:
    offsets = {"across": second.x - first.x, "down": second.y - first.y}
    return {k: int(d > 0) if abs(d) >= _MIN_OFFSET else IGNORED for k, d in offsets.items()}


class AuxiliaryHeads(nn.Module):
    """Linear heads on the residual stream: for one object at the middle layer, for two objects at the last one."""

    def __init__(self, model: Mamba) -> None:
        """Make the heads, and hook the two layers of `model`."""
        super().__init__()
        width, layers = model.config.d_model, model.backbone.layers
        self.one, self.two = (nn.Linear(width, sum(sizes.values())) for sizes in (ABOUT_ONE, ABOUT_TWO))
        self._residuals: dict[str, Tensor] = {}
        for name, at in (("one", len(layers) // 2), ("two", len(layers) - 1)):
            layer: Any = layers[at]
            layer.norm.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Tensor]) -> None:
            self._residuals[name] = args[0]

        return keep

    def loss(self, named: list[tuple[int, int, Mention]]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of all heads after a forward pass of the model, and the accuracies for one and two objects.

        Args:
            named: (row, position, mention) for each name in the batch of that pass.
        """
        rows, positions = (torch.tensor([n[i] for n in named]) for i in (0, 1))
        losses, right = [], {}
        for part, head, sizes in (("one", self.one, ABOUT_ONE), ("two", self.two, ABOUT_TWO)):
            residuals = self._residuals[part][rows, positions]
            out = head(F.rms_norm(residuals, residuals.shape[-1:])).float()
            ok, labelled = [], []
            for label, logits in zip(sizes, out.split(list(sizes.values()), dim=-1), strict=True):
                wanted = torch.tensor([n[2].labels[label] for n in named])
                if (wanted != IGNORED).any():
                    losses.append(F.cross_entropy(logits, wanted, ignore_index=IGNORED))
                ok.append((logits.argmax(-1) == wanted) | (wanted == IGNORED))
                labelled.append(wanted != IGNORED)
            known = torch.stack(labelled).any(0)
            if known.any():
                right[f"heads_{part}"] = float(torch.stack(ok).all(0)[known].float().mean())
        return torch.stack(losses).mean(), right
