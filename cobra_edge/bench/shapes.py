"""Published model shapes by name, to measure at full size without a download."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import InputError
from ..formats.model_config import MambaConfig
from ..model.backbones import language_backbone
from ..terminal.suggestions import near_matches


class Shape(NamedTuple):
    """Identifiers of a shape, as in the config of a run directory."""

    vision_backbone_id: str
    arch_specifier: str
    llm_backbone_id: str

    @property
    def mamba(self) -> MambaConfig:
        """Config of the decoder."""
        return language_backbone(self.llm_backbone_id).mamba


SHAPES: dict[str, Shape] = {
    "cobra-3b": Shape("dinosiglip-vit-so-384px", "no-align+fused-gelu-mlp", "mamba-2.8b-zephyr"),
    "cobra-mini": Shape("dinosiglip-vit-mini-112px", "no-align+fused-gelu-mlp", "mamba-mini-zephyr"),
}


def shape_named(name: str) -> Shape:
    """Return a shape. Raises InputError, with similar names, if it is unknown."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}{near_matches(name, SHAPES)}")
    return SHAPES[name]
