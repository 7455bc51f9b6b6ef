"""What the statistics say about the input of a matrix as it is stored: norms folded, rotated, scaled (see `transforms`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..formats.hadamard import rotate
from ..formats.recipe import Recipe
from .statistics import HEAD, Statistics, projection_of
from .transforms import NO_SCALES, InputScales


def stored_second_moment(
    name: str, tensor: Callable[[str], np.ndarray], recipe: Recipe, statistics: Statistics, scales: InputScales = NO_SCALES
) -> np.ndarray:
    """Return the second moment of what a stored matrix is multiplied with, (in, in) float32, symmetric.

    Args:
        name: of the matrix; a tied head's is that of the embedding.
        tensor: gives any of the model's own tensors by name, float32.
        recipe: which rotations.
        statistics: of the model as it is.
        scales: AWQ's, of the matrix's inputs.

    Raises:
        InputError: the statistics hold nonsense.
    """
    found = projection_of(name)
    assert found is not None
    layer, projection = found
    moment = statistics.second_moment(layer, projection)
    if projection == HEAD:
        moment = _scaled(moment, tensor("backbone.norm_f.weight"))
    elif projection == "in_proj" and not recipe.rotates_residual:
        moment = _scaled(moment, tensor(f"backbone.layers.{layer}.norm.weight"))
    if _rotated(projection, recipe):
        moment = rotate(rotate(moment).T)
    return _scaled(moment, 1 / scales[name]) if name in scales else moment


def clips(name: str, group: int, recipe: Recipe, statistics: Statistics) -> np.ndarray:
    """Return where the rounded input of a stored matrix is clipped, (in / group,) float32, as the recipe's percentile says.

    Raises:
        InputError: the statistics hold nonsense, or nothing of this basis.
    """
    found = projection_of(name)
    assert found is not None and recipe.activation_percentile is not None
    layer, projection = found
    bounds = statistics.percentile(layer, projection, group, recipe.activation_percentile, rotated=_rotated(projection, recipe))
    return np.maximum(bounds, np.finfo(np.float32).tiny)  # inputs that are always 0


def _rotated(projection: str, recipe: Recipe) -> bool:
    return recipe.rotates_out_proj if projection == "out_proj" else recipe.rotates_residual and projection in ("in_proj", HEAD)


def _scaled(moment: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return moment * factors[:, None] * factors
