"""The two sequential operations of the torch model, run by the native kernels instead of a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..formats.model_config import MambaConfig
from ..model.fused_kernels import fused_operations
from ..model.mamba import REFERENCE, Operations
from .cpu import why_not

_KERNELS = "auto"


def best_operations() -> Operations:
    """Return the native operations, or the plain ones if the native module is missing."""
    return REFERENCE if why_not() else Operations(causal_conv, selective_scan)


def operations_on(device: torch.device, config: MambaConfig) -> Operations:
    """Return the sequential operations for a float model on a device: the native ones on a processor, fused ones on a GPU."""
    return best_operations() if device.type == "cpu" else fused_operations(device, config.d_inner, config.d_conv)


def causal_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `model.mamba.causal_conv` on (batch, seq, d_inner) float32, without a gradient; the state is not changed."""
    from . import _cpu

    taps, offsets = _array(weight.T), _array(bias)

    def one(row: int) -> np.ndarray:
        return _cpu.kernels.conv_silu(_array(x[row]), _copied(state[row]), taps, offsets, _KERNELS)

    return _stacked(one, range(len(x)))


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `model.mamba.selective_scan` on (batch, seq, d_inner) float32, without a gradient; h is not changed."""
    from . import _cpu

    after = _copied(h)
    decay, skip, bias = _array(A), _array(D), _array(dt_bias)

    def one(row: int) -> np.ndarray:
        each = (_array(t[row]) for t in (u, dt))
        return _cpu.kernels.selective_scan(
            *each, decay, _array(B[row]), _array(C[row]), skip, _array(z[row]), bias, after[row], _KERNELS
        )

    return _stacked(one, range(len(u))), torch.from_numpy(after)


def _stacked(one: Callable[[int], np.ndarray], rows: Iterable[int]) -> Tensor:
    """Return the results for every row of a batch as one tensor; rows run in parallel."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return torch.from_numpy(np.stack(list(threads.map(one, rows))))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _copied(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.array(tensor.detach().float().numpy(), np.float32, order="C")
