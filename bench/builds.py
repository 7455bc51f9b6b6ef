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
        export: keyword arguments of `export_bundle`, beside those of PLAIN; None for the defaults of the target.
        target: name of the device profile.
        activations: data type at run time; None for that of the recipe.
        peer: another project's weight format, run by our runtime; skipped with a message if its library is missing.
    """

    label: str
    export: Mapping[str, Any] | None
    target: str = "cpu"
    activations: str | None = None
    peer: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `export_bundle`."""
        return {} if self.export is None else {**PLAIN, **self.export}

    @property
    def weight_bits(self) -> int:
        """Bits of a code; 4 for a mix."""
        return scheme_named(self.options.get("scheme", "w4a16-g128")).weight_bits


PLAIN: dict[str, Any] = {"method": "rtn", "vision_precision": "fp32"}


# The weights of cobra-mini ship as float16, so this build is bit-identical.
REFERENCE = Build("fp16", {"scheme": "fp16"})

_BEST = {"method": "gptq", "rotation": "both"}
_GUIDED = {"activations": "float32", "method": "guided", "rotation": "out-proj"}
DEFAULT = "default for a CPU"
DEFAULT_ON_GPU = "default for Jetson and RTX"
# Each 4-bit row adds one technique to rounding to nearest; the last of a group has all of them.
BUILDS = (
    Build(DEFAULT, None),
    Build(DEFAULT_ON_GPU, None, target="jetson"),
    Build("w8a16-channel", {"scheme": "w8a16-channel"}),
    Build("w8a16-g128", {"scheme": "w8a16-g128"}),
    Build("w8a16-g128 gptq, rotated", {"scheme": "w8a16-g128", **_BEST}),
    Build("w8a8, one scale per token", {"scheme": "w8a16-channel"}, activations="int8"),
    Build("w8a8", {"scheme": "w8a8"}),
    Build("w8a8 gptq, rotated", {"scheme": "w8a8", **_BEST}),
    Build("w4a16-g128", {"scheme": "w4a16-g128"}),
    Build("w4a16-g128 awq", {"scheme": "w4a16-g128", "method": "awq"}),
    Build("w4a16-g128 rotated", {"scheme": "w4a16-g128", "rotation": "both"}),
    Build("w4a16-g128 gptq", {"scheme": "w4a16-g128", "method": "gptq"}),
    Build("w4a16-g128 gptq, out_proj rotated", {"scheme": "w4a16-g128", "method": "gptq", "rotation": "out-proj"}),
    Build("w4a16-g128 gptq, residual rotated", {"scheme": "w4a16-g128", "method": "gptq", "rotation": "residual"}),
    Build("w4a16-g128 gptq, rotated", {"scheme": "w4a16-g128", **_BEST}),
    Build("w4a16-g128 awq-gptq, rotated", {"scheme": "w4a16-g128", "method": "awq-gptq", "rotation": "both"}),
    Build("w4a16-g64 gptq, rotated", {"scheme": "w4a16-g64", **_BEST}),
    Build("w4a16-g32", {"scheme": "w4a16-g32"}),
    Build("w4a16-g32 gptq, rotated", {"scheme": "w4a16-g32", **_BEST}),
    Build("w4a8", {"scheme": "w4a8"}),
    Build("w4a8 gptq, rotated", {"scheme": "w4a8", **_BEST}),
    Build("w4a8 gptq, rotated, clipped at 99.99", {"scheme": "w4a8", **_BEST, "clip_activations": 99.99}),
    Build("w3a16-g64", {"scheme": "w3a16-g64"}),
    Build("w3a16-g64 gptq, rotated", {"scheme": "w3a16-g64", **_BEST}),
    Build("mixed, 4.3 bits", {"activations": "float32", "bits": 4.3, **_BEST}),
    Build("mixed, 4.0 bits", {"activations": "float32", "bits": 4.0, **_BEST}),
    Build("mixed, 3.5 bits", {"activations": "float32", "bits": 3.5, **_BEST}),
    Build("w4a16-g128 guided", {"scheme": "w4a16-g128", "method": "guided"}),
    Build("guided, 4.3 bits", {**_GUIDED, "bits": 4.3, "rotation": "none"}),
    Build("guided, 4.3 bits, out_proj rotated", {**_GUIDED, "bits": 4.3}),
    Build("guided, 4.0 bits, out_proj rotated", {**_GUIDED, "bits": 4.0}),
    Build("guided, 3.5 bits, out_proj rotated", {**_GUIDED, "bits": 3.5}),
    Build("bitsandbytes nf4", {"scheme": "bnb-nf4"}, peer=True),
    Build("bitsandbytes int8", {"scheme": "bnb-int8"}, peer=True),
)
