"""Variants of cobra-mini for `calibration.fusion`: each differs in one thing from the published way of fusing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cobra_edge.errors import InputError
from cobra_edge.formats.model_config import PROJECTOR_KINDS, ProjectorKind, VisionConfig
from cobra_edge.model.backbones import vision_backbone
from cobra_edge.terminal.suggestions import near_matches

from .package_mini import CONFIG

ENCODERS = {"dinov2+siglip": "dinosiglip", "siglip": "siglip", "dinov2": "dinov2"}


@dataclass(frozen=True)
class Variant:
    """One way to fuse vision and language.

    Attributes:
        encoders: a key of ENCODERS.
        projector: kind of the projector.
        image_last: whether the image follows the question, instead of coming first; no run directory can say so.
        heads: whether auxiliary heads helped in training.
    """

    encoders: str
    projector: ProjectorKind
    image_last: bool = False
    heads: bool = True

    @property
    def name(self) -> str:
        """What it is called, in files too."""
        order = "-image-last" if self.image_last else "" if self.heads else "-without-heads"
        return f"{ENCODERS[self.encoders]}-{self.projector}{order}"

    @property
    def vision(self) -> VisionConfig:
        """The encoders."""
        return vision_backbone(f"{ENCODERS[self.encoders]}-vit-mini-112px")

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json of its run directory."""
        changed = {
            "model_id": f"cobra-mini-{self.name}",
            "arch_specifier": f"no-align+{self.projector}",
            "vision_backbone_id": self.vision.backbone_id,
        }
        return {"model": CONFIG["model"] | changed}


# The published one first. Where the image comes last a question names objects before they are seen, and auxiliary heads have
# nothing to predict: so the published order is trained without them too.
_PUBLISHED = Variant("dinov2+siglip", "fused-gelu-mlp")
VARIANTS = {
    variant.name: variant
    for variant in (
        _PUBLISHED,
        *(Variant("dinov2+siglip", kind) for kind in PROJECTOR_KINDS if kind != _PUBLISHED.projector),
        *(Variant(encoders, kind) for encoders in ("siglip", "dinov2") for kind in PROJECTOR_KINDS),
        Variant("dinov2+siglip", "fused-gelu-mlp", heads=False),
        Variant("dinov2+siglip", "fused-gelu-mlp", image_last=True, heads=False),
    )
}


def variant_named(name: str) -> Variant:
    """Return a variant. Raises InputError with near matches."""
    if name not in VARIANTS:
        raise InputError(f"unknown variant {name!r}{near_matches(name, VARIANTS)}")
    return VARIANTS[name]
