"""Statistics of the inputs of stored matrices: norms folded, rotated, scaled as in `transforms`.

The second moment H = E[x xᵀ] of the inputs is the Hessian of the squared error of W x, up to a factor of 2.
"""

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
    """Return the second moment of a stored matrix's inputs, (in, in) float32, symmetric.

    Args:
        name: of the matrix; the embedding's for a tied head.
        tensor: returns any tensor of the model by name, float32.
        recipe: with the rotations.
        statistics: of the untransformed model.
        scales: AWQ's, (in,) float32 by matrix.

    Raises:
        InputError: the statistics hold invalid values.
    """
    found = projection_of(name)
    assert found is not None
    layer, projection = found
    hessian = statistics.second_moment(layer, projection)
    if projection == HEAD:
        hessian = _scaled(hessian, tensor("backbone.norm_f.weight"))
    elif projection == "in_proj" and not recipe.rotates_residual:
        hessian = _scaled(hessian, tensor(f"backbone.layers.{layer}.norm.weight"))
    if _rotated(projection, recipe):
        hessian = rotate(rotate(hessian).T)
    return _scaled(hessian, 1 / scales[name]) if name in scales else hessian


def clips(name: str, group: int, recipe: Recipe, statistics: Statistics) -> np.ndarray:
    """Return where the rounded input of a stored matrix is clipped, (in / group,) float32.

    Args:
        name: of the matrix.
        group: neighbouring inputs that share a clip.
        recipe: with the percentile and the rotations.
        statistics: of the untransformed model.

    Raises:
        InputError: the statistics hold invalid values, or none in the rotated basis.
    """
    found = projection_of(name)
    assert found is not None and recipe.activation_percentile is not None
    layer, projection = found
    bounds = statistics.percentile(layer, projection, group, recipe.activation_percentile, rotated=_rotated(projection, recipe))
    return np.maximum(bounds, np.finfo(np.float32).tiny)  # inputs that are always 0


def _rotated(projection: str, recipe: Recipe) -> bool:
    return recipe.rotates_out_proj if projection == "out_proj" else recipe.rotates_residual and projection in ("in_proj", HEAD)


def _scaled(hessian: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return hessian * factors[:, None] * factors
