"""Which builds of cobra-mini `python -m bench.quality` measures: one row each, as `export_bundle` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cobra_edge.formats.scheme import scheme_named


@dataclass(frozen=True)
class Build:
    """One build.

    Attributes:
        label: what tables call it; unique.
        export: keyword arguments of `export_bundle`; "scheme" is always among them.
        activations: what the runtime does to them; None for what the recipe says.
        peer: another project's way to store weights, run by our runtime; where its library is missing it is not measured.
    """

    label: str
    export: Mapping[str, Any]
    activations: str | None = None
    peer: bool = False

    @property
    def weight_bits(self) -> int:
        """Bits of a code; a mix stands beside those of 4 bits."""
        return scheme_named(self.export.get("scheme", "w4a16-g128")).weight_bits


# cobra-mini is float16 as it ships, so this build has its weights bit for bit.
REFERENCE = Build("fp16", {"scheme": "fp16"})

_BEST = {"method": "gptq", "rotation": "both"}
# Each 4-bit row adds one ingredient to round to nearest; the last of a group has all of them.
BUILDS = (
    Build("w8a16-channel", {"scheme": "w8a16-channel"}),
    Build("w8a16-g128", {"scheme": "w8a16-g128"}),
    Build("w8a16-g128 gptq, rotated", {"scheme": "w8a16-g128", **_BEST}),
    Build("w8a8, a scale a token", {"scheme": "w8a16-channel"}, activations="int8"),
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
    Build("bitsandbytes nf4", {"scheme": "bnb-nf4"}, peer=True),
    Build("bitsandbytes int8", {"scheme": "bnb-int8"}, peer=True),
)
