"""The baseline's tensors in the form that a build's have, so that any of the build's can be put among them.

A build's matrices may be rotated, and scaled by AWQ. What the baseline has is folded, rotated and scaled alike, in float32; the
scales are read off the build: at a norm exactly, at dt_proj from its columns.
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
    """Return every tensor of the decoder as the build would hold it in float32.

    Args:
        build: whose recipe says what is rotated and scaled.
        tensors: the build's own.
        own: gives any of the model's own tensors by name, float32.
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
    """Return a tensor's values, float32."""
    return value.dequantize() if isinstance(value, QuantizedTensor) else np.asarray(value, np.float32)
