"""The builds of cobra-mini that `python -m bench.quality` measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cobra_edge.formats.scheme import scheme_named


@dataclass(frozen=True)
class Build:
    """One build.

    Attributes:
        label: in tables; unique.
        export: keyword arguments of `export_bundle`; without any, the default of the target.
        target: name of the device profile.
        draw: seed of other calibration lines than the embedded ones, as many and of the same kind; None for those.
        activations: data type at run time; None for that of the recipe.
        peer: another project's weight format, run by our runtime; skipped with a message if its library is missing.
    """

    label: str
    export: Mapping[str, Any]
    target: str = "cpu"
    draw: int | None = None
    activations: str | None = None
    peer: bool = False

    @property
    def weight_bits(self) -> int:
        """Bits of a code; 4 for a mix."""
        return scheme_named(self.export.get("scheme", "w4a16-g128")).weight_bits


# Rounded to nearest, and images in float: what each row of the tables changes.
PLAIN: dict[str, Any] = {"method": "rtn", "vision_precision": "fp32"}


# The weights of cobra-mini ship as float16, so this build is bit-identical.
REFERENCE = Build("fp16", PLAIN | {"scheme": "fp16"})

_BEST = {"method": "gptq", "rotation": "both"}
DEFAULT = "default for a CPU"
DEFAULT_ON_GPU = "default for Jetson and RTX"
# Each 4-bit row adds one technique to rounding to nearest; the last of a group has all of them.
BUILDS = (
    Build(DEFAULT, {}),
    Build(DEFAULT_ON_GPU, {}, target="jetson"),
    Build(f"{DEFAULT_ON_GPU}, draw 1", {}, target="jetson", draw=1),
    Build(f"{DEFAULT_ON_GPU}, draw 2", {}, target="jetson", draw=2),
    Build("best, 4.0 bits", {"bits": 4.0}, target="jetson"),
    Build("best, 3.5 bits", {"bits": 3.5}, target="jetson"),
    Build("best, not rotated", {"rotation": "none"}, target="jetson"),
    Build("best, w8a16-g128", {"scheme": "w8a16-g128"}, target="jetson"),
    Build("best, w4a16-g128", {"scheme": "w4a16-g128"}, target="jetson"),
    Build("balanced", {"quality": "balanced"}, target="jetson"),
    Build("fast", {"quality": "fast"}, target="jetson"),
    Build("w8a16-channel", PLAIN | {"scheme": "w8a16-channel"}),
    Build("w8a16-g128", PLAIN | {"scheme": "w8a16-g128"}),
    Build("w8a16-g128 gptq, rotated", PLAIN | {"scheme": "w8a16-g128", **_BEST}),
    Build("w8a8, one scale per token", PLAIN | {"scheme": "w8a16-channel"}, activations="int8"),
    Build("w8a8", PLAIN | {"scheme": "w8a8"}),
    Build("w8a8 gptq, rotated", PLAIN | {"scheme": "w8a8", **_BEST}),
    Build("w4a16-g128", PLAIN | {"scheme": "w4a16-g128"}),
    Build("w4a16-g128 awq", PLAIN | {"scheme": "w4a16-g128", "method": "awq"}),
    Build("w4a16-g128 rotated", PLAIN | {"scheme": "w4a16-g128", "rotation": "both"}),
    Build("w4a16-g128 gptq", PLAIN | {"scheme": "w4a16-g128", "method": "gptq"}),
    Build("w4a16-g128 gptq, out_proj rotated", PLAIN | {"scheme": "w4a16-g128", "method": "gptq", "rotation": "out-proj"}),
    Build("w4a16-g128 gptq, residual rotated", PLAIN | {"scheme": "w4a16-g128", "method": "gptq", "rotation": "residual"}),
    Build("w4a16-g128 gptq, rotated", PLAIN | {"scheme": "w4a16-g128", **_BEST}),
    Build("w4a16-g128 awq-gptq, rotated", PLAIN | {"scheme": "w4a16-g128", "method": "awq-gptq", "rotation": "both"}),
    Build("w4a16-g64 gptq, rotated", PLAIN | {"scheme": "w4a16-g64", **_BEST}),
    Build("w4a16-g32", PLAIN | {"scheme": "w4a16-g32"}),
    Build("w4a16-g32 gptq, rotated", PLAIN | {"scheme": "w4a16-g32", **_BEST}),
    Build("w4a8", PLAIN | {"scheme": "w4a8"}),
    Build("w4a8 gptq, rotated", PLAIN | {"scheme": "w4a8", **_BEST}),
    Build("w4a8 gptq, rotated, clipped at 99.99", PLAIN | {"scheme": "w4a8", **_BEST, "clip_activations": 99.99}),
    Build("w3a16-g64", PLAIN | {"scheme": "w3a16-g64"}),
    Build("w3a16-g64 gptq, rotated", PLAIN | {"scheme": "w3a16-g64", **_BEST}),
    Build("w4a16-g128 guided", PLAIN | {"scheme": "w4a16-g128", "method": "guided"}),
    Build("bitsandbytes nf4", PLAIN | {"scheme": "bnb-nf4"}, peer=True),
    Build("bitsandbytes int8", PLAIN | {"scheme": "bnb-int8"}, peer=True),
)
