"""Guidance for stage language: at the word that completes an object's name, the residual stream has to say what stands there.

"Is the red circle left of the blue square?" has one bit of answer, the parity of a word and a relation of two objects that have
to be found first; from that bit alone nothing is learned for thousands of steps. Every name in a question is therefore asked
about where it stands: is there such an object, what is it, in which column and row; and at the second name, on which side of it
the first one lies. The heads are small, linear, and thrown away after training.
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
NOTHING = -100  # what torch's losses pass over
_MIN_OFFSET = 4.0  # pixels; nearer centres are neither left nor right
_NAME = re.compile(rf"\b(?:(?P<colour>{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}|object)\b")


@dataclass(frozen=True)
class Mention:
    """A name in a question: the character it ends at, and its labels by head, NOTHING where one does not apply."""

    end: int
    labels: dict[str, int]


def mentions(scene: Scene, prompt: str) -> Iterator[Mention]:
    """Yield every name of one object in a question about the scene, in order; plurals are no names."""
    first: Thing | None = None
    for name in _NAME.finditer(prompt):
        meant = [t for t in scene.things if _fits(t, name["colour"], name["shape"])]
        labels = dict.fromkeys((*ABOUT_ONE, *ABOUT_TWO), NOTHING) | {"there": int(bool(meant))}
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
    return {k: int(d > 0) if abs(d) >= _MIN_OFFSET else NOTHING for k, d in offsets.items()}


class Guide(nn.Module):
    """Linear heads on the residual stream: on one object half-way up the layers, on two objects one layer below the top."""

    def __init__(self, model: Mamba) -> None:
        """Make the heads and listen to the two layers of `model`."""
        super().__init__()
        width, layers = model.config.d_model, model.backbone.layers
        self.one, self.two = (nn.Linear(width, sum(sizes.values())) for sizes in (ABOUT_ONE, ABOUT_TWO))
        self._heard: dict[str, Tensor] = {}
        for name, at in (("one", len(layers) // 2), ("two", len(layers) - 1)):
            layer: Any = layers[at]
            layer.norm.register_forward_pre_hook(self._listener(name))

    def _listener(self, name: str) -> Any:
        def listen(_module: nn.Module, args: tuple[Tensor]) -> None:
            self._heard[name] = args[0]

        return listen

    def loss(self, named: list[tuple[int, int, Mention]]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of all heads after a forward pass of the model, and how often one and two were placed right.

        Args:
            named: (row, position, mention) for each name in the batch of that pass.
        """
        rows, positions = (torch.tensor([n[i] for n in named]) for i in (0, 1))
        losses, right = [], {}
        for part, head, sizes in (("one", self.one, ABOUT_ONE), ("two", self.two, ABOUT_TWO)):
            heard = self._heard[part][rows, positions]
            out = head(F.rms_norm(heard, heard.shape[-1:])).float()
            ok, asked = [], []
            for label, logits in zip(sizes, out.split(list(sizes.values()), dim=-1), strict=True):
                wanted = torch.tensor([n[2].labels[label] for n in named])
                if (wanted != NOTHING).any():
                    losses.append(F.cross_entropy(logits, wanted, ignore_index=NOTHING))
                ok.append((logits.argmax(-1) == wanted) | (wanted == NOTHING))
                asked.append(wanted != NOTHING)
            told = torch.stack(asked).any(0)
            if told.any():
                right[f"guide_{part}"] = float(torch.stack(ok).all(0)[told].float().mean())
        return torch.stack(losses).mean(), right
