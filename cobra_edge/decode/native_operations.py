"""The two sequential operations of the torch model, run by the native kernels instead of a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..formats.model_config import MambaConfig
from ..model.fused_kernels import fused_operations
from ..model.mamba import REFERENCE, Operations
from ..model.mamba import causal_conv as reference_conv
from .cpu import why_not

_KERNELS = "auto"
_Result = TypeVar("_Result")


def best_operations() -> Operations:
    """Return the native operations, or the plain ones if the native module is missing."""
    return REFERENCE if why_not() else Operations(causal_conv, selective_scan)


def operations_on(device: torch.device, config: MambaConfig) -> Operations:
    """Return the sequential operations for a float model on a device: the native ones on a processor, fused ones on a GPU."""
    return best_operations() if device.type == "cpu" else fused_operations(device, config.d_inner, config.d_conv)


def differentiable_operations() -> Operations:
    """Return operations with gradients: the native scan, or the plain one if the native module is missing."""
    return REFERENCE if why_not() else Operations(reference_conv, differentiable_scan)


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


class _Scan(torch.autograd.Function):
    """`selective_scan` with gradients with respect to all its inputs; states are recomputed, not saved."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return selective_scan(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        from . import _cpu

        u, dt, A, B, C, D, z, dt_bias, h = ctx.saved_tensors
        out, last = gradients
        decay, skip, bias = _array(A), _array(D), _array(dt_bias)

        def one(row: int) -> tuple[np.ndarray, ...]:
            of_row = [_array(t[row]) for t in (u, dt, B, C, z, h, out, last)]
            u_, dt_, B_, C_, z_, h_, out_, last_ = of_row
            return _cpu.kernels.scan_gradient(u_, dt_, decay, B_, C_, skip, z_, bias, h_, out_, last_, _KERNELS)

        gu, gdt, gB, gC, gz, gh, gA, gD, gbias = map(np.stack, zip(*_parallel(one, range(len(u))), strict=True))
        found = gu, gdt, gA.sum(0), gB, gC, gD.sum(0), gz, gbias.sum(0), gh
        return tuple(torch.from_numpy(g) for g in found)


def differentiable_scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `model.mamba.selective_scan` on (batch, seq, d_inner) float32, with gradients for all its inputs."""
    out, last = _Scan.apply(*inputs)
    return out, last


def _stacked(one: Callable[[int], np.ndarray], rows: Sequence[int]) -> Tensor:
    """Return the results for every row of a batch as one tensor; rows run in parallel."""
    return torch.from_numpy(np.stack(_parallel(one, rows)))


def _parallel(one: Callable[[int], _Result], rows: Sequence[int]) -> list[_Result]:
    threads = min(torch.get_num_threads(), len(rows))
    if threads < 2:  # starting a thread takes longer than a short row
        return [one(row) for row in rows]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, rows))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _copied(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.array(tensor.detach().float().numpy(), np.float32, order="C")
