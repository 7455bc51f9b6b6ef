"""Quantization to bitsandbytes' codes, by bitsandbytes: NormalFloat4, and 8-bit integers with one scale per row.

Source: Dettmers et al. 2023, "QLoRA", section 3 (NF4, blocks of 64); Dettmers et al. 2022, "LLM.int8()", section 2 (a row's
largest magnitude at code 127). No double quantization: scales stay float32.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from .packing import QuantizedTensor
from .scheme import CodeFormat, Scheme

_WEIGHTS_AT_ONCE = 1 << 24  # per call: rows are independent, and temporaries would grow with the matrix


def why_no_bitsandbytes() -> str | None:
    """Return why bitsandbytes cannot be imported, with the install command, or None if it can."""
    if importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("torch") is None:
        return f"bitsandbytes is not installed ({install_hint('bnb')})"
    return None


def load_bitsandbytes() -> Any:
    """Import and return bitsandbytes.

    Raises:
        MachineError: it is not installed.
    """
    reason = why_no_bitsandbytes()
    if reason:
        raise MachineError(f"this scheme needs bitsandbytes: {reason}")
    # It warns about missing optional kernels, and in every int8 matmul that activations are cast to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def quantize_bitsandbytes(weight: np.ndarray, scheme: Scheme) -> QuantizedTensor:
    """Quantize a matrix with bitsandbytes.

    Args:
        weight: (out, in) float32, finite.
        scheme: of code format "nf4" or "int8-rows".

    Returns:
        bitsandbytes' codes and, as scales, the largest magnitude of each block or row, (out, in / group) float32.

    Raises:
        InputError: `in` does not fit the scheme; values that are not finite, or for "int8-rows" overflow float16, in which
            bitsandbytes takes them. MachineError: bitsandbytes is not installed.
    """
    reason = scheme.refuses(weight.shape[1])
    if reason:
        raise InputError(f"{reason}; choose another scheme or keep this tensor in float")
    quantize = _QUANTIZERS[scheme.code_format]
    bnb = load_bitsandbytes()
    out, n_in = weight.shape
    codes = np.empty((out, n_in * scheme.weight_bits // 8), scheme.code_dtype)
    scales = np.empty((out, n_in // scheme.group(n_in)), scheme.scale_dtype)
    step = max(1, _WEIGHTS_AT_ONCE // n_in)
    for start in range(0, out, step):
        rows = slice(start, start + step)
        part_codes, part_scales = quantize(bnb.functional, weight[rows], scheme)
        codes[rows] = part_codes.reshape(codes[rows].shape)
        scales[rows] = part_scales.reshape(scales[rows].shape)
    if not np.isfinite(scales).all():
        raise InputError(f"a weight is not finite or too large for {scheme.name}; fix the checkpoint")
    return QuantizedTensor(codes, scales, scheme)


def _nf4(functional: Any, weight: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    import torch

    values = torch.tensor(weight, dtype=torch.float32)
    codes, state = functional.quantize_4bit(values, blocksize=scheme.group_size, quant_type="nf4", compress_statistics=False)
    return codes.numpy(), state.absmax.numpy()


def _int8_rows(functional: Any, weight: np.ndarray, _scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    import torch

    codes, scales, _ = functional.int8_vectorwise_quant(torch.tensor(weight, dtype=torch.float16))
    codes[scales == 0] = 0  # from 0 / 0: NaN converts to different integers on different processors
    return codes.numpy(), scales.numpy()


_QUANTIZERS: dict[CodeFormat, Callable[[Any, np.ndarray, Scheme], tuple[np.ndarray, np.ndarray]]] = {
    "nf4": _nf4,
    "int8-rows": _int8_rows,
}
