"""Individual kernels: for the float model's sequential operations, for tests and measurements.

All arrays are contiguous float32 where nothing else is said, and `kernels` is the name of an instruction set, or "auto".
Results are new arrays, filled with NaN before, which reveals values that a kernel does not write. Raises ValueError for arrays
that do not fit each other, or a number of threads that is not 1 to 1024; results do not depend on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from .arguments import array, in_place, in_range, pointers
from .library import Array, library, require


def exponential(x: np.ndarray, kernels: str) -> np.ndarray:
    """Return exp(x), (n,) float32."""
    out = _result(x.shape)
    require(library().cobra_exponential(array("x", x), array("out", out), kernels.encode()))
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, kernels: str) -> np.ndarray:
    """Return x / rms(x) · weight of one token, (width,) float32."""
    out = _result(x.shape)
    given = array("x", x), array("weight", weight)
    require(library().cobra_rms_norm(*given, eps, array("out", out), kernels.encode()))
    return out


def multiply(
    values: np.ndarray,
    scales: np.ndarray | None,
    x: np.ndarray,
    int8: bool,
    onto: np.ndarray | None,
    kernels: str,
    clips: np.ndarray | None = None,
) -> np.ndarray:
    """Return x · matrixᵀ, (tokens, rows), added to `onto` if given.

    Args:
        values: (rows, cols) float16 or float32, or codes (rows, n) uint8.
        scales: (rows, groups) float16, of codes.
        x: (tokens, cols).
        int8: whether x is quantized first.
        onto: (tokens, rows).
        kernels: see the module.
        clips: (groups,), of codes.
    """
    out = _result((len(x), len(values))) if onto is None else np.array(onto, np.float32, order="C")
    optional = [None if each is None else array("values", each) for each in (scales, clips)]
    given = array("values", values), *optional, array("x", x)
    require(library().cobra_multiply(*given, int8, onto is not None, array("out", out), kernels.encode()))
    return out


def dequantize(values: np.ndarray, scales: np.ndarray | None, cols: int, kernels: str) -> np.ndarray:
    """Return a matrix (rows, cols), as `multiply` takes it, as float32."""
    out = _result((len(values), cols))
    stored = array("values", values), None if scales is None else array("values", scales)
    require(library().cobra_dequantize(*stored, array("out", out), kernels.encode()))
    return out


def conv_silu(
    x: np.ndarray, state: np.ndarray, weight: np.ndarray, bias: np.ndarray, kernels: str, threads: int = 1
) -> np.ndarray:
    """Return silu(causal convolution), (tokens, channels) float32.

    Args:
        x: (tokens, channels).
        state: (channels, taps), the last inputs, newest last; updated in place.
        weight: (taps, channels).
        bias: (channels,).
        kernels, threads: see the module.
    """
    out = _result(x.shape)
    given = array("x", x), in_place("state", state), array("weight", weight), array("bias", bias)
    require(library().cobra_conv_silu(*given, array("out", out), kernels.encode(), _threads(threads)))
    return out


_SCAN = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


def selective_scan(
    u: np.ndarray, dt: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray, z: np.ndarray,
    dt_bias: np.ndarray, h: np.ndarray, kernels: str, threads: int = 1,
) -> np.ndarray:  # fmt: skip
    """Return the gated output of the selective scan, (tokens, channels) float32. Source: Gu and Dao 2023, algorithm 2.

    Args:
        u, dt, z: (tokens, channels).
        A: (channels, d_state), negative.
        B, C: (tokens, d_state).
        D, dt_bias: (channels,).
        h: (channels, d_state), updated in place.
        kernels, threads: see the module.
    """
    out = _result(u.shape)
    given = [*_described(_SCAN, (u, dt, A, B, C, D, z, dt_bias)), in_place("h", h)]
    require(library().cobra_selective_scan(pointers(given), array("out", out), kernels.encode(), _threads(threads)))
    return out


def scan_gradient(
    u: np.ndarray, dt: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray, z: np.ndarray,
    dt_bias: np.ndarray, h: np.ndarray, gradient: np.ndarray, last_gradient: np.ndarray, kernels: str, threads: int = 1,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Return the gradients of `selective_scan` with respect to u, dt, A, B, C, D, z, dt_bias and h, each of its shape, float32.

    Args:
        u, dt, A, B, C, D, z, dt_bias, h: as of `selective_scan`; h is the state before it.
        gradient: of the output, (tokens, channels).
        last_gradient: of the final state, (channels, d_state).
        kernels, threads: see the module.
    """
    inputs = u, dt, A, B, C, D, z, dt_bias, h
    outputs = [_result(each.shape) for each in inputs]
    names = (*_SCAN, "h")
    given = pointers(_described((*names, "gradient", "last_gradient"), (*inputs, gradient, last_gradient)))
    found = pointers(_described(names, outputs))
    require(library().cobra_scan_gradient(given, found, kernels.encode(), _threads(threads)))
    return tuple(outputs)


def rotate(x: np.ndarray, matrix: np.ndarray, kernels: str) -> np.ndarray:
    """Return x (tokens, width) float32 rotated by the Hadamard matrix that `matrix` (order, order) is a factor of."""
    out = np.array(x, np.float32, order="C")
    require(library().cobra_rotate(array("x", out), array("matrix", matrix), kernels.encode()))
    return out


def read_once(words: np.ndarray, threads: int) -> int:
    """Read every word of (n,) uint64 once, one sequential stream per thread; return their sum modulo 2⁶⁴."""
    if words.dtype != np.uint64 or words.ndim != 1 or not words.flags.c_contiguous:
        raise ValueError("words must be a contiguous array (n,) of uint64")
    total = ctypes.c_uint64()
    require(library().cobra_read_once(words.ctypes.data, len(words), _threads(threads), ctypes.byref(total)))
    return total.value


def peak_macs(kernels: str, threads: int) -> float:
    """Return the int8 multiply-accumulates per second on registers alone, of that many threads together."""
    per_second = ctypes.c_double()
    require(library().cobra_peak_macs(kernels.encode(), _threads(threads), ctypes.byref(per_second)))
    return per_second.value


def _threads(threads: int) -> int:
    return in_range("threads", threads, 1, 1024)


def _result(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def _described(names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[Array]:
    return [array(name, each) for name, each in zip(names, arrays, strict=True)]
