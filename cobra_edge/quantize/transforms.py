"""Transforms of weights before quantization: norms folded in, rotations, AWQ's input scales.

A transform leaves the model unchanged in exact arithmetic: what it does to a matrix is undone in a neighbouring tensor, or by a
runtime as `Recipe.rotations` says. The order is fold, rotate, scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..formats.hadamard import rotate
from ..formats.recipe import Recipe

# Scales of a matrix's inputs (in,) float32 by the name of the matrix; the tensor that makes these inputs is divided by them.
InputScales = Mapping[str, np.ndarray]
NO_SCALES: InputScales = {}
_Transform = Callable[["_Weights", str, np.ndarray], np.ndarray]


class _Weights:
    """A model's tensors by name, with the recipe and scales that transform them."""

    def __init__(self, tensor: Callable[[str], np.ndarray], recipe: Recipe, scales: InputScales) -> None:
        self.tensor, self.recipe, self.scales = tensor, recipe, scales

    def scaled(self, name: str, values: np.ndarray) -> np.ndarray:
        """Multiply columns (inputs) by the scales of the matrix, if it has any."""
        return values * self.scales[name] if name in self.scales else values


def _table(weights: _Weights, _layer: str, values: np.ndarray) -> np.ndarray:
    return rotate(values) if weights.recipe.rotates_residual else values


def _norm(weights: _Weights, layer: str, values: np.ndarray) -> np.ndarray:
    values = np.ones_like(values) if weights.recipe.rotates_residual else values
    consumer = f"{layer}.mixer.in_proj.weight"
    return values / weights.scales[consumer] if consumer in weights.scales else values


def _in_proj(weights: _Weights, layer: str, values: np.ndarray) -> np.ndarray:
    if weights.recipe.rotates_residual:
        values = rotate(values * weights.tensor(f"{layer}.norm.weight"))
    return weights.scaled(f"{layer}.mixer.in_proj.weight", values)


def _x_proj(weights: _Weights, layer: str, values: np.ndarray) -> np.ndarray:
    consumer = f"{layer}.mixer.dt_proj.weight"
    if consumer in weights.scales:
        values = values.copy()
        values[: len(weights.scales[consumer])] /= weights.scales[consumer][:, None]
    return values


def _dt_proj(weights: _Weights, layer: str, values: np.ndarray) -> np.ndarray:
    return weights.scaled(f"{layer}.mixer.dt_proj.weight", values)


def _out_proj(weights: _Weights, _layer: str, values: np.ndarray) -> np.ndarray:
    if weights.recipe.rotates_out_proj:
        values = rotate(values)  # row w of W becomes R w, which is row w of W Rᵀ
    return np.ascontiguousarray(rotate(values.T).T) if weights.recipe.rotates_residual else values


_OF_MODEL: dict[str, _Transform] = {"backbone.embedding.weight": _table, "lm_head.weight": _table}
_OF_LAYER: dict[str, _Transform] = {  # by the name within a layer
    "norm.weight": _norm,
    "mixer.in_proj.weight": _in_proj,
    "mixer.x_proj.weight": _x_proj,
    "mixer.dt_proj.weight": _dt_proj,
    "mixer.out_proj.weight": _out_proj,
}


def transformed_tensor(
    name: str, tensor: Callable[[str], np.ndarray], recipe: Recipe, scales: InputScales = NO_SCALES
) -> np.ndarray:
    """Return the values that replace a tensor of the decoder, float32, of the tensor's shape.

    Args:
        name: of the tensor.
        tensor: returns any tensor of the model by name, float32.
        recipe: with the rotations.
        scales: AWQ's, (in,) float32 by matrix (Lin et al. 2024, section 3.2). Only in_proj and dt_proj can have scales: their
            inputs, the norm and the first rows of x_proj, are linear. Between the convolution's SiLU and x_proj, and
            between the gate and out_proj, a channel's factor cannot be moved into a neighbouring tensor.
    """
    layer, within = _split(name)
    transform = _OF_MODEL.get(name) or _OF_LAYER.get(within)
    return transform(_Weights(tensor, recipe, scales), layer, tensor(name)) if transform else tensor(name)


def input_source(name: str) -> str:
    """Return the tensor that is divided by the AWQ scales of an in_proj or dt_proj: the norm's weight, or x_proj."""
    layer, within = _split(name)
    return f"{layer}.norm.weight" if within == "mixer.in_proj.weight" else f"{layer}.mixer.x_proj.weight"


def _split(name: str) -> tuple[str, str]:
    """Return the layer, such as "backbone.layers.3", and the name within it; "" and the whole name outside of layers."""
    backbone, layers, index, *within = *name.split(".", 3), "", "", ""
    return (f"{backbone}.{layers}.{index}", within[0]) if (backbone, layers) == ("backbone", "layers") else ("", name)
