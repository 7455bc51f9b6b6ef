"""The two sequential operations of the torch model, run by the native kernels instead of a Python loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..formats.model_config import MambaConfig
from ..model.fused_kernels import fused_operations
from ..model.mamba import REFERENCE, Operations
from ..model.mamba import causal_conv as reference_conv
from .native import kernels
from .native.library import why_not

_KERNELS = "auto"
_WORTH_THREADS = 1 << 17  # values of a row; starting threads takes longer than fewer
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
    taps, offsets = _array(weight.T), _array(bias)

    def one(row: int, threads: int) -> np.ndarray:
        return kernels.conv_silu(_array(x[row]), _copied(state[row]), taps, offsets, _KERNELS, threads)

    return _stacked(one, x)


def selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `model.mamba.selective_scan` on (batch, seq, d_inner) float32, without a gradient; h is not changed."""
    after = _copied(h)
    decay, skip, bias = _array(A), _array(D), _array(dt_bias)

    def one(row: int, threads: int) -> np.ndarray:
        u_, dt_, B_, C_, z_ = (_array(t[row]) for t in (u, dt, B, C, z))
        return kernels.selective_scan(u_, dt_, decay, B_, C_, skip, z_, bias, after[row], _KERNELS, threads)

    return _stacked(one, u), torch.from_numpy(after)


class _Scan(torch.autograd.Function):
    """`selective_scan` with gradients with respect to all its inputs; states are recomputed, not saved."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return selective_scan(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        u, dt, A, B, C, D, z, dt_bias, h = ctx.saved_tensors
        out, last = gradients
        decay, skip, bias = _array(A), _array(D), _array(dt_bias)

        def one(row: int, threads: int) -> tuple[np.ndarray, ...]:
            u_, dt_, B_, C_, z_, h_, out_, last_ = (_array(t[row]) for t in (u, dt, B, C, z, h, out, last))
            return kernels.scan_gradient(u_, dt_, decay, B_, C_, skip, z_, bias, h_, out_, last_, _KERNELS, threads)

        gu, gdt, gA, gB, gC, gD, gz, gbias, gh = map(np.stack, zip(*_parallel(one, u), strict=True))
        found = gu, gdt, gA.sum(0), gB, gC, gD.sum(0), gz, gbias.sum(0), gh
        return tuple(torch.from_numpy(g) for g in found)


def differentiable_scan(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `model.mamba.selective_scan` on (batch, seq, d_inner) float32, with gradients for all its inputs."""
    out, last = _Scan.apply(*inputs)
    return out, last


def _stacked(one: Callable[[int, int], np.ndarray], batch: Tensor) -> Tensor:
    """Return the results for every row of a batch as one tensor."""
    return torch.from_numpy(np.stack(_parallel(one, batch)))


def _parallel(one: Callable[[int, int], _Result], batch: Tensor) -> list[_Result]:
    """Return one(row, threads) for the rows of a batch (batch, seq, channels): side by side, or each on all threads."""
    rows, threads = len(batch), torch.get_num_threads()
    if rows < threads or rows == 1:
        enough = batch[:1].numel() >= _WORTH_THREADS if rows else False
        return [one(row, threads if enough else 1) for row in range(rows)]
    if threads == 1:
        return [one(row, 1) for row in range(rows)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda row: one(row, 1), range(rows)))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _copied(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.array(tensor.detach().float().numpy(), np.float32, order="C")
