"""Bits per weight, counted the same way for all runners: bits on disk over the number of weights of the model.

The figure of the matrices counts codes, scales, zero points, clips and matrices left in float; the other one everything. The
small float vectors (norms, convolution, A_log, D, biases) are the same for all runners and matter only in a model as small as
cobra-mini, so runners are compared by the first figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import matrix_bits, matrix_names, matrix_weights


@dataclass(frozen=True)
class StoredBits:
    """Bits per weight of the matrices, and of the whole decoder."""

    matrices: float
    all: float


def stored_bits(config: MambaConfig, matrix_bytes: int, all_bytes: int) -> StoredBits:
    """Return bits per weight from the bytes of the matrices and of the whole decoder."""
    return StoredBits(8 * matrix_bytes / matrix_weights(config), 8 * all_bytes / config.n_parameters)


def bundle_bits(bundle: Bundle) -> StoredBits:
    """Return bits per weight of a bundle's decoder."""
    config = bundle.manifest.model.mamba
    bits = sum(matrix_bits(config, bundle.manifest.recipe).values())
    return stored_bits(config, bits // 8, bundle.manifest.files[DECODER].bytes)


def gguf_bits(config: MambaConfig, tensors: dict[str, int], file_bytes: int) -> StoredBits:
    """Return bits per weight of a GGUF.

    Args:
        config: of the decoder.
        tensors: bytes of each tensor by its GGUF name.
        file_bytes: of the whole file.
    """
    kinds = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
    return stored_bits(config, sum(size for name, size in tensors.items() if name.endswith(kinds)), file_bytes)


def with_float_rest(config: MambaConfig, quantized: Iterable[str], quantized_bytes: int) -> StoredBits:
    """Return bits per weight of a partly quantized decoder; other matrices are float16 and vectors float32, as in our bundles.

    Args:
        config: sizes of the decoder.
        quantized: names of the quantized matrices.
        quantized_bytes: their total size.
    """
    shapes, names, apart = decoder_shapes(config), matrix_names(config), set(quantized)
    matrix_bytes = quantized_bytes + sum(2 * math.prod(shapes[name]) for name in names if name not in apart)
    vectors = sum(4 * math.prod(shape) for name, shape in shapes.items() if name not in names)
    return stored_bits(config, matrix_bytes, matrix_bytes + vectors)
