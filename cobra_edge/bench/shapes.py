"""Published shapes, by name: what is measured at full size without a download."""

from __future__ import annotations

from ..errors import InputError, near_matches
from ..model.config import MambaConfig

# Shape name -> sizes of the decoder, vision backbone, arch_specifier, llm_backbone_id.
SHAPES: dict[str, tuple[MambaConfig, str, str, str]] = {
    "cobra-3b": (
        MambaConfig(d_model=2560, n_layer=64, vocab=50280, d_inner=5120, d_state=16, d_conv=4, dt_rank=160),
        "dinosiglip-vit-so-384px",
        "no-align+fused-gelu-mlp",
        "mamba-2.8b-zephyr",
    ),
    "cobra-mini": (
        MambaConfig(d_model=256, n_layer=4, vocab=512, d_inner=512, d_state=16, d_conv=4, dt_rank=16),
        "dinosiglip-vit-mini-112px",
        "no-align+fused-gelu-mlp",
        "mamba-mini-zephyr",
    ),
}


def shape_named(name: str) -> tuple[MambaConfig, str, str, str]:
    """Return a shape of the table. Raises InputError with near matches."""
    if name not in SHAPES:
        raise InputError(f"unknown shape {name!r}{near_matches(name, SHAPES)}")
    return SHAPES[name]
