"""The cost of int8 activations with outliers: one scale per position, per group, and per group after a rotation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from cobra_edge.decode.numpy_reference import round_activations
from cobra_edge.formats.hadamard import rotate
from cobra_edge.quantize.hessian import clips
from cobra_edge.quantize.statistics import Statistics
from cobra_edge.quantize.transforms import transformed_tensor

from .method_errors import HeldOutActivations, QuantizedLayer, matrix_name, relative
from .outlier_layers import OutlierLayer

PERCENTILE = 99.9  # of absolute values, at which activations are clipped
_SITES = ("in_proj", "out_proj")


@dataclass(frozen=True)
class RoundingVariant:
    """How activations are rounded: channels that share a scale (None for all), and the method whose recipe applies."""

    name: str
    group: int | None
    codes_of: str


ROUNDING_VARIANTS = (
    RoundingVariant("one scale per position", None, "gptq"),
    RoundingVariant("groups of 128", 128, "gptq"),
    RoundingVariant("groups of 128, rotation both", 128, "rotation both, gptq"),
)


@dataclass(frozen=True)
class RoundingError:
    """Relative errors of one layer; see `methods_result.RoundingRow`."""

    form: str
    clipped_at: float | None
    site: str
    activations: float
    inlier: float
    with_codes: float


def activation_rounding_errors(
    layer: OutlierLayer, statistics: Statistics, held_out: HeldOutActivations, results: Mapping[str, QuantizedLayer]
) -> Iterator[RoundingError]:
    """Yield the errors of each variant, with and without clipping, for each matmul.

    Args:
        layer: with outliers.
        statistics: of the layer, for clipping.
        held_out: inputs of the matmuls.
        results: quantized layers, by method.
    """
    for form in ROUNDING_VARIANTS:
        result = results[form.codes_of]
        recipe = msgspec.structs.replace(result.quantizer.recipe, activation_percentile=PERCENTILE)
        for site in _SITES:
            name, inliers = matrix_name(site), ~layer.outlier_channels[site]
            inputs, own = held_out.inputs[site], layer.tensor(name)
            weight, rotated = transformed_tensor(name, layer.tensor, recipe), recipe.rotates_residual
            x = inputs
            if rotated:
                x = rotate(inputs / layer.tensor("backbone.layers.0.norm.weight") if site == "in_proj" else inputs)
            group = form.group or x.shape[1]
            expected, from_inliers = x @ weight.T, inputs[:, inliers] @ own[:, inliers].T
            for bounds in (None, clips(name, group, recipe, statistics)):
                rounded = round_activations(x, group, bounds)
                error = (rounded - x) @ weight.T
                yield RoundingError(
                    form=form.name,
                    clipped_at=None if bounds is None else PERCENTILE,
                    site=site,
                    activations=relative(error, expected),
                    inlier=relative(error, from_inliers),
                    with_codes=relative(rounded @ result.stored[site].T - expected, expected),
                )
