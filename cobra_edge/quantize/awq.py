"""Activation-aware scales: weights of inputs with large magnitudes are scaled up before rounding, and the inputs down.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization", section 3.2: scales are a power of the inputs' magnitudes,
and the power is searched. `transforms.transformed_tensor` says which matrices of a Mamba can have scales.
"""

from __future__ import annotations

import numpy as np

from ..formats.scheme import Scheme
from .rtn import round_to_nearest
from .scales import least_error_scales

_POWERS = np.linspace(0, 1, 11)
_ROWS = 1024  # of the matrix that the search evaluates
_LEAST_MAGNITUDE = 1e-4  # magnitudes are raised to this share of the largest


def input_scales(weight: np.ndarray, second_moment: np.ndarray, scheme: Scheme) -> np.ndarray:
    """Return the scales of a matrix's inputs that give rounding to nearest the least error.

    Args:
        weight: (out, in) float32, finite.
        second_moment: (in, in) float32, of the inputs.
        scheme: with groups that divide in.

    Returns:
        (in,) float32, positive, their geometric mean 1; ones if no power of the magnitudes is better.
    """
    magnitudes = np.sqrt(np.diagonal(second_moment).astype(np.float64))
    if not magnitudes.any():
        return np.ones(len(magnitudes), np.float32)
    logs = np.log(np.maximum(magnitudes, _LEAST_MAGNITUDE * magnitudes.max()))
    logs -= logs.mean()
    rows = weight[:: max(1, len(weight) // _ROWS)]
    candidates = [np.exp(power * logs).astype(np.float32) for power in _POWERS]
    return min(candidates, key=lambda scales: _error(rows, second_moment, scales, scheme))


def _error(rows: np.ndarray, second_moment: np.ndarray, scales: np.ndarray, scheme: Scheme) -> float:
    scaled = rows * scales
    steps = least_error_scales(scaled, scheme, np.diagonal(second_moment) / scales**2)
    rounded = round_to_nearest(scaled, scheme, steps).dequantize()
    difference = (rounded - scaled) / scales
    return float(((difference @ second_moment) * difference).sum())
