"""Round to nearest: the plainest quantizer, and the floor every other one is measured against."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from ..packing import QuantizedTensor, pack
from ..scheme import Scheme

_ROWS_AT_ONCE = 1 << 22  # weights worked on together, so that the temporaries stay in the cache's neighbourhood


def round_to_nearest(weight: np.ndarray, scheme: Scheme) -> QuantizedTensor:
    """Quantize a matrix, each group of a row by itself.

    The weight of largest magnitude in a group lands exactly on the lowest code, whatever its sign: the scale takes the
    opposite sign, and none of the 2^bits codes is wasted on the symmetric end. The scale is rounded to float16 before the
    codes are chosen.

    Args:
        weight: (out, in), float16 or float32, finite.
        scheme: with groups.

    Raises:
        InputError: a group size that does not divide, values that are not finite or whose scale overflows float16.
    """
    reason = scheme.refuses(weight.shape[1])
    if reason:
        raise InputError(f"{reason}; choose another scheme or keep this tensor in float")
    out, n_in = weight.shape
    group = scheme.group(n_in)
    n_groups = n_in // group
    codes = np.empty((out, n_in * scheme.weight_bits // 8), np.uint8)
    scales = np.empty((out, n_groups), np.float16)
    step = max(1, _ROWS_AT_ONCE // n_in)
    for start in range(0, out, step):
        rows = np.asarray(weight[start : start + step], np.float32).reshape(-1, n_groups, group)
        codes[start : start + step], scales[start : start + step] = _round_rows(rows, scheme)
    return QuantizedTensor(codes, scales, scheme)


def _round_rows(rows: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    low, high = rows.min(axis=2), rows.max(axis=2)
    extreme = np.where(-low > high, low, high)
    zero = scheme.zero_code
    with np.errstate(over="ignore"):
        scales = (extreme / -zero).astype(np.float16)
    if not np.isfinite(scales).all():
        raise InputError("a weight is not finite or too large for a float16 scale; mend the checkpoint")
    wide = scales.astype(np.float32)
    inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)
    scaled = rows * inverse[..., None]
    np.rint(scaled, out=scaled)
    scaled += zero
    np.clip(scaled, 0, 2 * zero - 1, out=scaled)
    return pack(scaled.astype(np.uint8).reshape(len(rows), -1), scheme), scales
