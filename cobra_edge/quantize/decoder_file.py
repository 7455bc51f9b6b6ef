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
from .bitsandbytes_codes import quantize_bitsandbytes
from .preparation import prepared
from .rtn import round_to_nearest


def write_decoder(checkpoint: Checkpoint, recipe: Recipe, file: Path, on_tensor: Callable[[], None]) -> None:
    """Write every tensor of the decoder as the recipe says.

    Args:
        checkpoint: opened, tensors memory-mapped.
        recipe: storage of each tensor, and what is rotated.
        file: decoder.safetensors.
        on_tensor: called after each tensor, for progress.

    Raises:
        InputError: a tensor holds NaN or infinity, or does not fit float16; it is named.
    """
    plan = stored_tensors(checkpoint.config.mamba, recipe)
    with TensorFileWriter(file, [t for entries in plan.values() for t in entries]) as writer:
        for name, entries in plan.items():
            values = prepared(name, lambda n: require_finite(n, checkpoint.decoder[n].float()).numpy(), recipe)
            scheme = quantized_scheme(recipe, name)
            if scheme is not None:
                quantize = round_to_nearest if scheme.code_format == "int" else quantize_bitsandbytes
                quantized = quantize(values, scheme)
                writer.write(entries[0].name, quantized.codes)
                writer.write(entries[1].name, quantized.scales)
            else:
                if entries[0].dtype == "float16" and np.abs(values).max() > np.finfo(np.float16).max:
                    raise InputError(f"{name}: a value of {np.abs(values).max():.3g} does not fit float16")
                writer.write(name, values.astype(entries[0].dtype))
            on_tensor()
