"""Quantize a decoder into decoder.safetensors, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..model.checkpoint import Checkpoint
from ..model.weight_files import require_finite
from ..recipe import Recipe, quantized_scheme, stored_tensors
from ..tensor_file import TensorFileWriter
from .methods import quantizer
from .moments import clips
from .statistics import Statistics


def write_decoder(
    checkpoint: Checkpoint,
    recipe: Recipe,
    file: Path,
    on_tensor: Callable[[], None],
    statistics: Statistics | None = None,
) -> None:
    """Write every tensor of the decoder as the recipe says.

    Args:
        checkpoint: opened, tensors memory-mapped.
        recipe: storage of each tensor, what is rotated, and the method.
        file: decoder.safetensors.
        on_tensor: called after each tensor, for progress.
        statistics: of this model; needed by every method but rtn, and for clipping.

    Raises:
        InputError: a tensor holds NaN or infinity, or does not fit float16; it is named.
    """
    config = checkpoint.config.mamba

    def tensor(name: str) -> np.ndarray:
        return require_finite(name, checkpoint.decoder[name].float()).numpy()

    plan, quantize = stored_tensors(config, recipe), quantizer(config, recipe, tensor, statistics)
    with TensorFileWriter(file, [t for entries in plan.values() for t in entries]) as writer:
        for name, entries in plan.items():
            scheme = quantized_scheme(recipe, name)
            if scheme is not None:
                quantized = quantize.quantize(name, scheme)
                writer.write(entries[0].name, quantized.codes)
                writer.write(entries[1].name, quantized.scales)
                if len(entries) > 2:
                    assert statistics is not None
                    writer.write(entries[2].name, clips(name, scheme.group(quantized.shape[1]), recipe, statistics))
            else:
                values = quantize.prepared(name)
                if entries[0].dtype == "float16" and np.abs(values).max() > np.finfo(np.float16).max:
                    raise InputError(f"{name}: a value of {np.abs(values).max():.3g} does not fit float16")
                writer.write(name, values.astype(entries[0].dtype))
            on_tensor()
