"""Tensors of the baseline in the form of a build's, so that each can be replaced by that of the build.

Matrices of a build may be rotated, and scaled by AWQ. The tensors of the baseline are folded, rotated and scaled in the same
way, in float32. The scales are recovered from the build: exactly at a norm, by least squares per column at dt_proj.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..bundle.reader import Bundle
from ..formats.model_config import decoder_shapes
from ..formats.packing import QuantizedTensor
from ..quantize.transforms import transformed_tensor

Tensors = dict[str, "np.ndarray | QuantizedTensor"]


def float_tensors(build: Bundle, tensors: Tensors, own: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """Return all tensors of the decoder, float32, each of the shape that it has in the build.

    Args:
        build: with the recipe that defines rotations and scales.
        tensors: of the build, (out, in) matrices and (n,) vectors among them.
        own: returns a tensor of the checkpoint by name, float32.
    """
    config, recipe = build.manifest.model.mamba, build.manifest.recipe
    scales: dict[str, np.ndarray] = {}
    if recipe.method.startswith("awq"):
        for layer in range(config.n_layer):
            prefix = f"backbone.layers.{layer}"
            norm, matrix = f"{prefix}.norm.weight", f"{prefix}.mixer.dt_proj.weight"
            scales[f"{prefix}.mixer.in_proj.weight"] = transformed_tensor(norm, own, recipe) / dense(tensors[norm])
            wide, kept = own(matrix).astype(np.float64), dense(tensors[matrix])
            scales[matrix] = ((kept * wide).sum(0) / np.maximum(np.square(wide).sum(0), 1e-30)).astype(np.float32)
    return {
        name: np.ascontiguousarray(transformed_tensor(name, own, recipe, scales), np.float32) for name in decoder_shapes(config)
    }


def dense(value: np.ndarray | QuantizedTensor) -> np.ndarray:
    """Return the values of a tensor, float32, dequantized to (out, in) if it is quantized."""
    return value.dequantize() if isinstance(value, QuantizedTensor) else np.asarray(value, np.float32)
