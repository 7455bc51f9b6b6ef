"""Round to nearest: the simplest method, and the baseline of the others."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from ..formats.packing import QuantizedTensor, pack
from ..formats.scheme import Scheme
from .scales import largest_value_scales

_ROWS_AT_ONCE = 1 << 22  # weights processed together: temporaries stay near the cache


def round_to_nearest(weight: np.ndarray, scheme: Scheme, scales: np.ndarray | None = None) -> QuantizedTensor:
    """Quantize a matrix, each weight independently of the others, with codes chosen for the float16 scales.

    Args:
        weight: (out, in), float16 or float32, finite.
        scheme: with groups.
        scales: (out, in / group) float16; None for `largest_value_scales`.

    Raises:
        InputError: the group size does not divide in, values are not finite, or a scale overflows float16.
    """
    require_fit(weight, scheme)
    out, n_in = weight.shape
    scales = largest_value_scales(np.asarray(weight, np.float32), scheme) if scales is None else scales
    codes = np.empty((out, n_in * scheme.weight_bits // 8), np.uint8)
    step = max(1, _ROWS_AT_ONCE // n_in)
    for start in range(0, out, step):
        rows = np.asarray(weight[start : start + step], np.float32)
        codes[start : start + step] = _round_rows(rows, scales[start : start + step].astype(np.float32), scheme)
    return QuantizedTensor(codes, scales, scheme)


def require_fit(weight: np.ndarray, scheme: Scheme) -> None:
    """Raise InputError if a matrix (out, in) cannot be stored by the scheme."""
    reason = scheme.refuses(weight.shape[1])
    if reason:
        raise InputError(f"{reason}; choose another scheme or keep this tensor in float")


def _round_rows(rows: np.ndarray, scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    scaled = rows.reshape(*scales.shape, -1) * inverse[..., None]
    np.rint(scaled, out=scaled)
    scaled += scheme.zero_code
    np.clip(scaled, 0, 2 * scheme.zero_code - 1, out=scaled)
    return pack(scaled.astype(np.uint8).reshape(len(rows), -1), scheme)
