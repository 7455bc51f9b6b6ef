"""Quantize a decoder into decoder.safetensors, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..formats.packing import QuantizedTensor
from ..formats.recipe import FLOAT16, Recipe, has_clips, quantized_scheme, stored_tensors
from ..formats.safetensors_file import SafetensorsWriter
from ..model.checkpoint import Checkpoint
from ..model.weight_files import require_finite
from .hessian import clips
from .quantizer import Quantizer, quantizer
from .statistics import Statistics


def write_decoder(
    checkpoint: Checkpoint,
    recipe: Recipe,
    file: Path,
    on_tensor: Callable[[], None],
    statistics: Statistics | None = None,
    values: Mapping[str, np.ndarray | QuantizedTensor] = {},
) -> None:
    """Write every tensor of the decoder as the recipe says.

    Args:
        checkpoint: opened, tensors memory-mapped.
        recipe: storage of each tensor, rotations, and the method.
        file: decoder.safetensors.
        on_tensor: called after each of `scaled_matrices` and each tensor.
        statistics: of this model; required by methods that need them and for clipping.
        values: matrices that are quantized already, as stored.

    Raises:
        InputError: a tensor holds NaN or infinity, or does not fit float16; the message names it.
    """
    config = checkpoint.config.mamba

    def tensor(name: str) -> np.ndarray:
        return require_finite(name, checkpoint.decoder[name].float()).numpy()

    plan, quantize = stored_tensors(config, recipe), quantizer(config, recipe, tensor, statistics, on_tensor)
    with SafetensorsWriter(file, [t for entries in plan.values() for t in entries]) as writer:
        for name, entries in plan.items():
            value = stored_value(quantize, name, statistics, values.get(name))
            parts = [value] if isinstance(value, np.ndarray) else [value.codes, value.scales, value.clips]
            for entry, part in zip(entries, parts, strict=False):
                assert part is not None
                writer.write(entry.name, part)
            on_tensor()


def stored_value(
    quantize: Quantizer, name: str, statistics: Statistics | None = None, known: np.ndarray | QuantizedTensor | None = None
) -> np.ndarray | QuantizedTensor:
    """Return a tensor of the decoder as the quantizer's recipe stores it, float or quantized, of its shape.

    Args:
        quantize: quantizes by the recipe.
        name: of the tensor.
        statistics: of the model, for clipping.
        known: the tensor if it is quantized already.

    Raises:
        InputError: it holds NaN or infinity, or does not fit its scheme or float16; the message names it.
    """
    config, recipe = quantize.config, quantize.recipe
    scheme = quantized_scheme(recipe, name)
    if scheme is None:
        values = quantize.transformed(name)
        if recipe.storage(name) == FLOAT16 and np.abs(values).max() > np.finfo(np.float16).max:
            raise InputError(f"{name}: a value of {np.abs(values).max():.3g} does not fit float16")
        return np.ascontiguousarray(values, recipe.storage(name))
    quantized = known if isinstance(known, QuantizedTensor) else quantize.quantize(name, scheme)
    if not has_clips(config, recipe, name):
        return quantized
    assert statistics is not None
    return replace(quantized, clips=clips(name, scheme.group(quantized.shape[1]), recipe, statistics))
