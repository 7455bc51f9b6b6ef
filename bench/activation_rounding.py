"""What int8 activations cost where outliers are planted: one scale a position, one a group, one a group behind a rotation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from cobra_edge.decode.numpy_reference import round_activations
from cobra_edge.formats.hadamard import rotate
from cobra_edge.quantize.hessian import clips
from cobra_edge.quantize.statistics import Statistics
from cobra_edge.quantize.transforms import prepared

from .method_errors import HeldOutActivations, QuantizedLayer, matrix_name, relative
from .outlier_layers import OutlierLayer

PERCENTILE = 99.9
_SITES = ("in_proj", "out_proj")


@dataclass(frozen=True)
class RoundingVariant:
    """How activations are activation_rounding: how many neighbours share a scale (None: all), behind which variant's codes."""

    name: str
    group: int | None
    codes_of: str


ROUNDING_VARIANTS = (
    RoundingVariant("one scale a position", None, "gptq"),
    RoundingVariant("groups of 128", 128, "gptq"),
    RoundingVariant("groups of 128, rotation both", 128, "rotation both, gptq"),
)


def activation_rounding_rows(
    layer: OutlierLayer, statistics: Statistics, held_out: HeldOutActivations, results: Mapping[str, QuantizedLayer]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each form, clipped or not, and each product: relative errors of its output at held-out positions.

    "activations": int8 activations and float weights. "inlier": the same, relative to what the channels without planted outliers
    give alone. "with_codes": int8 activations and the 4-bit weights.
    """
    for form in ROUNDING_VARIANTS:
        result = results[form.codes_of]
        recipe = msgspec.structs.replace(result.quantizer.recipe, activation_percentile=PERCENTILE)
        for site in _SITES:
            name, loud = matrix_name(site), layer.outlier_channels[site]
            heard, own = held_out.inputs[site], layer.tensor(name)
            weight, turned = prepared(name, layer.tensor, recipe), recipe.rotates_residual
            x = heard
            if turned:
                x = rotate(heard / layer.tensor("backbone.layers.0.norm.weight") if site == "in_proj" else heard)
            group = form.group or x.shape[1]
            right, quiet = x @ weight.T, heard[:, ~loud] @ own[:, ~loud].T
            for bounds in (None, clips(name, group, recipe, statistics)):
                seen = round_activations(x, group, bounds)
                wrong = (seen - x) @ weight.T
                yield {
                    "form": form.name,
                    "clipped_at": None if bounds is None else PERCENTILE,
                    "site": site,
                    "activations": relative(wrong, right),
                    "inlier": relative(wrong, quiet),
                    "with_codes": relative(seen @ result.stored[site].T - right, right),
                }
