"""Bits per weight, counted the same way for everybody: what lies in the file, over the model's own weights.

Two figures. That of the matrices counts codes, scales, zero points, clips and matrices left float; the other everything there
is. The small float vectors (norms, convolution, A_log, D, biases) are the same for all runners and weigh much only in a
model as small as cobra-mini, so runners are told apart by the first.
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
    """Return bits per weight of a decoder whose matrices take so many bytes, and which takes so many in all."""
    return StoredBits(8 * matrix_bytes / matrix_weights(config), 8 * all_bytes / config.n_parameters)


def bundle_bits(bundle: Bundle) -> StoredBits:
    """Count a bundle's decoder."""
    config = bundle.manifest.model.mamba
    bits = sum(matrix_bits(config, bundle.manifest.recipe).values())
    return stored_bits(config, bits // 8, bundle.manifest.files[DECODER].bytes)


def gguf_bits(config: MambaConfig, tensors: dict[str, int], file_bytes: int) -> StoredBits:
    """Count a GGUF.

    Args:
        config: sizes of the decoder.
        tensors: bytes of each tensor by its GGUF name.
        file_bytes: of the whole file.
    """
    kinds = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_x.weight", "ssm_dt.weight", "ssm_out.weight")
    return stored_bits(config, sum(size for name, size in tensors.items() if name.endswith(kinds)), file_bytes)


def with_float_rest(config: MambaConfig, quantized: Iterable[str], quantized_bytes: int) -> StoredBits:
    """Count a decoder of which only some matrices are quantized: the others float16, vectors float32, as our bundles have them.

    Args:
        config: sizes of the decoder.
        quantized: names of the quantized matrices.
        quantized_bytes: what they take together.
    """
    shapes, names, apart = decoder_shapes(config), matrix_names(config), set(quantized)
    matrix_bytes = quantized_bytes + sum(2 * math.prod(shapes[name]) for name in names if name not in apart)
    vectors = sum(4 * math.prod(shape) for name, shape in shapes.items() if name not in names)
    return stored_bits(config, matrix_bytes, matrix_bytes + vectors)
