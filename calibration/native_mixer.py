"""Causal convolution and selective scan with gradients that a CPU can train with.

The references are `causal_conv` and `selective_scan` of `cobra_edge.model.mamba`; the contracts are the same, with d_state 16,
d_conv 4 and d_inner a multiple of 32.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cobra_edge.model.mamba import Operations


@cache
def _native() -> Any:
    from torch.utils.cpp_extension import load

    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp-simd", "-std=c++20"]
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    source = Path(__file__).with_name("mixer.cpp")
    load("cobra_edge_training_mixer", [str(source)], extra_cflags=flags, is_python_module=False)
    return torch.ops.cobra_edge_training


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _native().conv_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gu: Tensor) -> tuple[Tensor, ...]:
        return tuple(_native().conv_backward(*ctx.saved_tensors, gu.contiguous()))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        out, last = _native().scan_forward(*inputs)
        return out, last

    @staticmethod
    def backward(ctx: Any, gout: Tensor, glast: Tensor) -> tuple[Tensor, ...]:
        return tuple(_native().scan_backward(*ctx.saved_tensors, gout.contiguous(), glast.contiguous()))


def _conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _Conv.apply(x.float(), state.contiguous(), weight.float(), bias.float())


def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    dense = [x.float().contiguous() for x in (u, dt, A, B, C, D)]
    out, last = _Scan.apply(*dense, z.float(), bias.float(), h.contiguous())
    return out, last


NATIVE = Operations(conv=_conv, scan=_scan)
