"""What is stored in the place of a weight before it is quantized: norms folded in, rotated, scaled for its activations.

Everything here leaves the model what it was (in exact arithmetic): what is done to a matrix is undone by its neighbour, or by a
runtime as `Recipe.rotations` says. The order is fold, rotate, scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ..formats.hadamard import rotate
from ..formats.recipe import Recipe

# Scales of a matrix's inputs (in,) by the matrix's name; what feeds it is divided by them.
InputScales = Mapping[str, np.ndarray]
NO_SCALES: InputScales = {}


def transformed_tensor(
    name: str, tensor: Callable[[str], np.ndarray], recipe: Recipe, scales: InputScales = NO_SCALES
) -> np.ndarray:
    """Return what takes the place of a tensor of the decoder.

    Args:
        name: of the tensor.
        tensor: gives any of the model's own tensors by name, float32.
        recipe: which rotations.
        scales: AWQ's (Lin et al. 2024, section 3.2). Only in_proj and dt_proj can have any: what feeds them, the norm and the
            first rows of x_proj, is linear up to there. Between the convolution's SiLU and x_proj, and between the gate
            and out_proj, no factor of a channel can be moved into a neighbour.

    Returns:
        float32, of the tensor's shape.
    """
    values = tensor(name)
    layer, _, kind = name.rpartition(".mixer.")
    if name == "backbone.embedding.weight" or name == "lm_head.weight":
        return rotate(values) if recipe.rotates_residual else values
    if kind == "in_proj.weight":
        if recipe.rotates_residual:
            values = rotate(values * tensor(f"{layer}.norm.weight"))
        return values * scales[name] if name in scales else values
    if name.endswith(".norm.weight"):
        values = np.ones_like(values) if recipe.rotates_residual else values
        consumer = f"{name.removesuffix('.norm.weight')}.mixer.in_proj.weight"
        return values / scales[consumer] if consumer in scales else values
    if kind == "x_proj.weight":
        consumer = f"{layer}.mixer.dt_proj.weight"
        if consumer in scales:
            values = values.copy()
            values[: len(scales[consumer])] /= scales[consumer][:, None]
        return values
    if kind == "dt_proj.weight":
        return values * scales[name] if name in scales else values
    if kind == "out_proj.weight":
        if recipe.rotates_out_proj:
            values = rotate(values)  # row w of W becomes R w, which is row w of W Rᵀ
        return np.ascontiguousarray(rotate(values.T).T) if recipe.rotates_residual else values
    return values


def fed_by(name: str) -> str:
    """Return the tensor that takes back what AWQ's scales do to an in_proj or dt_proj: the norm's weight, or x_proj's rows."""
    layer, _, kind = name.rpartition(".mixer.")
    return f"{layer}.norm.weight" if kind == "in_proj.weight" else f"{layer}.mixer.x_proj.weight"
