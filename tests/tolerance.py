"""One comparator and one table of tolerances for every numerical test."""

from __future__ import annotations

import numpy as np

# (operation, dtype) -> largest relative RMS, largest absolute difference over the largest magnitude
TOLERANCES = {
    ("decoder", "float32"): (1e-5, 1e-4),
    ("decoder", "int16"): (
        5e-4,
        2e-3,
    ),  # what enters a product rounded to 16-bit integers, a scale for 128; seen: see docs/log.md
    ("decoder", "float16"): (3e-3, 1e-2),  # the same decoder with its matrices rounded to float16 in another basis
    ("decoder", "float16 products"): (8e-3, 2e-2),  # what enters a product rounded to float16; seen: 4.8e-3 and 6.4e-3
    ("decoder", "int8"): (3e-2, 1e-1),
    ("decoder", "bnb-int8"): (3e-2, 5e-2),  # activations rounded, beside activations left; seen: 1.2e-2 and 1.9e-2
    ("exponential", "float32"): (2e-7, 1e-6),
    ("vision", "float32"): (1e-5, 1e-4),
    ("vision", "float16"): (1e-3, 2e-3),  # one float16 graph, run with other options; seen: 3.3e-4 and 6.9e-4
    ("onnx", "float32"): (1e-4, 1e-3),
    ("rotation", "float32"): (1e-6, 1e-5),
    ("rotation", "float16"): (5e-4, 1e-3),
    ("product", "float32"): (1e-6, 1e-6),
    ("product", "int16"): (
        2e-4,
        3e-4,
    ),  # activations as 16-bit integers, one of a group 40 times as loud; seen: 1.1e-4 and 1.4e-4
    ("product", "float16"): (4e-4, 2e-3),  # a group's weights are rounded to float16
    ("product", "int8-rows"): (3e-5, 3e-5),  # bitsandbytes multiplies by 6.200124e-5, which is 1.8e-5 above 1 / 127²
    ("scan", "float32"): (1e-5, 1e-4),
    ("scan", "int16"): (2e-4, 3e-4),  # behind a dt_proj of codes
    ("scan", "float16"): (5e-4, 1e-3),  # float16 out of sums that differ in their last bits
    ("norm", "float16"): (5e-4, 1e-3),
    ("convolution", "float32"): (1e-6, 1e-6),
    ("convolution", "float16"): (5e-4, 1e-3),
    ("statistics", "float32"): (1e-4, 1e-4),
    ("statistics", "float16"): (5e-4, 5e-4),  # correlations are kept in float16
    ("gradient", "float32"): (1e-5, 1e-4),
}


def distance(got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return relative RMS and relative largest difference; infinity where something is not finite or shapes differ."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf"), float("inf")
    difference = got - expected
    rms = np.sqrt((expected**2).mean()) or 1.0
    top = np.abs(expected).max() or 1.0
    return float(np.sqrt((difference**2).mean()) / rms), float(np.abs(difference).max() / top)


def assert_close(got: np.ndarray, expected: np.ndarray, operation: str, dtype: str = "float32") -> None:
    """Fail unless both distances are within the table."""
    limits = TOLERANCES[operation, dtype]
    found = distance(got, expected)
    assert found[0] <= limits[0] and found[1] <= limits[1], f"{operation}: distances {found}, limits {limits}"
