"""Which builds of cobra-mini `bench quality` measures: one row each, as `export_bundle` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..scheme import scheme_named


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
        """Bits of a code."""
        return scheme_named(self.export["scheme"]).weight_bits


# cobra-mini is float16 as it ships, so this build has its weights bit for bit.
REFERENCE = Build("fp16", {"scheme": "fp16"})

BUILDS = (
    Build("w8a16-g128", {"scheme": "w8a16-g128"}),
    Build("w8a8", {"scheme": "w8a8"}, activations="int8"),
    Build("w4a16-g128", {"scheme": "w4a16-g128"}),
    Build("w4a16-g64", {"scheme": "w4a16-g64"}),
    Build("w4a16-g32", {"scheme": "w4a16-g32"}),
    Build("w4a16-g128 rotated", {"scheme": "w4a16-g128", "rotation": "out-proj"}),
    Build("w4a8", {"scheme": "w4a8"}, activations="int8"),
    Build("w3a16-g64", {"scheme": "w3a16-g64"}),
)
