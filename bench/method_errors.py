"""Errors and time of each quantization method on layers of a published shape.

Statistics and quantized weights are made by the same functions that calibrate and export call. Quantized weights are
transformed back to the basis of the model, so that all methods are judged by the same matmuls on the same inputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cobra_edge.formats.hadamard import unrotate
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import ROTATIONS, Recipe, quantized_scheme, uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.model.mamba import Block
from cobra_edge.quantize.calibration import ObservedBlock
from cobra_edge.quantize.quantizer import Quantizer, quantizer
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.quantize.statistics import SCHEMA_VERSION, Header, Statistics
from cobra_edge.version import __version__

from .outlier_layers import OutlierLayer

SCHEME = "w4a16-g128"
SITES = ("in_proj", "x_proj", "out_proj")
SEQUENCE = 512  # positions per sequence
_BATCH = 4  # sequences per batch, as in calibrate


@dataclass(frozen=True)
class MethodVariant:
    """A method, its rotation, and whether the scale of a group is set by its largest weight."""

    name: str
    method: str
    rotation: str = "none"
    largest_value: bool = False

    def recipe(self, config: MambaConfig) -> Recipe:
        """Return the recipe of a model."""
        return uniform_recipe(config, scheme_named(SCHEME), self.method, ROTATIONS[self.rotation])[0]


VARIANTS = (
    MethodVariant("rtn, largest-value scales", "rtn", largest_value=True),
    MethodVariant("rtn, least-error scales", "rtn"),
    MethodVariant("gptq", "gptq"),
    MethodVariant("rotation both, rtn", "rtn", "both"),
    MethodVariant("rotation both, gptq", "gptq", "both"),
    MethodVariant("awq", "awq"),
    MethodVariant("awq-gptq", "awq-gptq"),
)


@dataclass(frozen=True, eq=False)
class CalibratedLayer:
    """Statistics of a layer, and the time they took: the part proportional to the number of positions, and the rest."""

    statistics: Statistics
    streaming_seconds: float
    finishing_seconds: float


@dataclass(frozen=True, eq=False)
class HeldOutActivations:
    """Inputs and output of a float layer at held-out positions, float32.

    Attributes:
        streams: (positions, d_model), the residual streams before the layer.
        inputs: (positions, in), by matmul.
        output: (positions, d_model), what its mixer adds to the stream.
    """

    streams: Tensor
    inputs: dict[str, np.ndarray]
    output: np.ndarray


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """Dequantized matrices (out, in) float32 in the basis they are stored in, seconds, both by site; and the quantizer."""

    stored: dict[str, np.ndarray]
    seconds: dict[str, float]
    quantizer: Quantizer


def matrix_name(site: str) -> str:
    """Return the name of the matrix of a site, such as "in_proj"."""
    return f"backbone.layers.0.mixer.{site}.weight"


@torch.inference_mode()
def calibrate_layer(layer: OutlierLayer, positions: int) -> CalibratedLayer:
    """Compute the statistics of a layer from new positions, a multiple of 512."""
    streams, observed = layer.streams(positions), ObservedBlock(layer.block(), 0, layer.config, positions)
    began = time.perf_counter()
    for batch in _batches(streams):
        batch[:] = observed(batch, *_zero_state(batch, layer.config))[0]
    streamed = time.perf_counter()
    tensors = observed.tensors()
    header = Header(SCHEMA_VERSION, __version__, "random", "", "", 0, positions)
    return CalibratedLayer(Statistics(header, layer.config, tensors), streamed - began, time.perf_counter() - streamed)


@torch.inference_mode()
def held_out_activations(layer: OutlierLayer, positions: int) -> HeldOutActivations:
    """Run the float layer on new positions, a multiple of 512."""
    streams, block, inputs = layer.streams(positions), layer.block(), dict[str, list[Tensor]]()
    for site in SITES:
        getattr(block.mixer, site).register_forward_pre_hook(
            lambda _module, given, site=site: inputs.setdefault(site, []).append(given[0].flatten(0, 1))
        )
    output = mixer_output(block, streams, layer.config)
    return HeldOutActivations(streams, {site: torch.cat(parts).numpy() for site, parts in inputs.items()}, output)


@torch.inference_mode()
def mixer_output(block: Block, streams: Tensor, config: MambaConfig) -> np.ndarray:
    """Return what a block's mixer adds to streams (positions, d_model) float32, of the same shape and dtype."""
    outputs = [block.mixer(block.norm(batch), *_zero_state(batch, config))[0].flatten(0, 1) for batch in _batches(streams)]
    return torch.cat(outputs).numpy()


def _batches(streams: Tensor) -> Iterator[Tensor]:
    """Yield views (sequences, 512, d_model) of streams (positions, d_model) float32."""
    sequences = streams.view(-1, SEQUENCE, streams.shape[1])
    for start in range(0, len(sequences), _BATCH):
        yield sequences[start : start + _BATCH]


def _zero_state(batch: Tensor, config: MambaConfig) -> tuple[Tensor, Tensor]:
    """Return zero states: (sequences, d_inner, d_conv) and (sequences, d_inner, d_state), float32."""
    shape = len(batch), config.d_inner
    return torch.zeros(*shape, config.d_conv), torch.zeros(*shape, config.d_state)


def quantize_layer(variant: MethodVariant, layer: OutlierLayer, statistics: Statistics) -> QuantizedLayer:
    """Quantize the matrices of a layer; the search of AWQ is counted for in_proj, the only matrix that it scales here."""
    recipe, began = variant.recipe(layer.config), time.perf_counter()
    quantize = quantizer(layer.config, recipe, layer.tensor, statistics)
    searched = time.perf_counter() - began
    stored, seconds = dict[str, np.ndarray](), dict[str, float]()
    for site in SITES:
        name, began = matrix_name(site), time.perf_counter()
        scheme = quantized_scheme(recipe, name)
        assert scheme is not None
        nearest = variant.largest_value
        codes = round_to_nearest(quantize.transformed(name), scheme) if nearest else quantize.quantize(name, scheme)
        seconds[site] = time.perf_counter() - began
        stored[site] = codes.dequantize()
    seconds["in_proj"] += searched
    return QuantizedLayer(stored, seconds, quantize)


def restored(site: str, stored: np.ndarray, quantize: Quantizer) -> np.ndarray:
    """Undo `transforms.transformed_tensor`: return the stored matrix, (out, in) float32, in the basis of the model."""
    recipe, scales, name = quantize.recipe, quantize.scales, matrix_name(site)
    values = stored / scales[name] if name in scales else stored
    if site == "in_proj" and recipe.rotates_residual:
        return unrotate(values) / quantize.tensor("backbone.layers.0.norm.weight")
    if site == "x_proj" and (consumer := matrix_name("dt_proj")) in scales:
        values = values.copy()
        values[: len(scales[consumer])] *= scales[consumer][:, None]
    if site == "out_proj":
        values = unrotate(values) if recipe.rotates_out_proj else values
        values = np.ascontiguousarray(unrotate(values.T).T) if recipe.rotates_residual else values
    return values


def relative(wrong: np.ndarray, right: np.ndarray) -> float:
    """Return ‖wrong‖ / ‖right‖ over all values; arrays of one shape, float."""
    return float(np.linalg.norm(wrong) / np.linalg.norm(right))


def errors_of(result: QuantizedLayer, layer: OutlierLayer, held_out: HeldOutActivations) -> dict[str, float]:
    """Return ‖ΔW x‖ / ‖W x‖ of each matmul on the inputs of the float layer, and of the whole mixer ("layer").

    The mixer runs with all three matrices replaced, so errors propagate through the layer.
    """
    own = {site: restored(site, stored, result.quantizer) for site, stored in result.stored.items()}
    errors = {}
    for site, x in held_out.inputs.items():
        weight = layer.tensor(matrix_name(site))
        errors[site] = relative(x @ (own[site] - weight).T, x @ weight.T)
    block = layer.block({matrix_name(site): values for site, values in own.items()})
    errors["layer"] = relative(mixer_output(block, held_out.streams, layer.config) - held_out.output, held_out.output)
    return errors
