"""Many tokens on a GPU: products on tensor cores in float16, everything that goes token after token in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...formats.model_config import MambaConfig
from .kernels.fused import Chosen
from .kernels.gemm import multiply_many
from .kernels.norm import rms_norm_many
from .kernels.rotation import norm_between_rotations, rotate_many
from .state import GpuState
from .weights import GpuLayer, GpuWeights

_LARGEST = torch.finfo(torch.float16).max
CHUNK = 2048  # tokens that go through the layers together: what bounds the memory of a long prompt


@dataclass(frozen=True)
class Sequential:
    """The two operations that go token after token, by whichever kernels were chosen."""

    convolution: Chosen
    scan: Chosen


def run_layers(weights: GpuWeights, sequential: Sequential, residual: torch.Tensor, state: GpuState) -> None:
    """Run a chunk of tokens through all layers.

    Args:
        weights: the decoder's.
        sequential: convolution and scan.
        residual: (seq, d_model) float32, in the basis the weights are stored in; becomes what is behind the last layer.
        state: read and changed; its `n_tokens` too.
    """
    room = _Room(weights, len(residual))
    for index, layer in enumerate(weights.layers):
        _layer(weights, layer, sequential, room, residual, state, index)
    state.n_tokens += len(residual)


def normed_for_head(weights: GpuWeights, residual: torch.Tensor) -> torch.Tensor:
    """Return what the head multiplies, (seq, d_model) float16, of a residual stream behind the last layer."""
    normed = torch.empty_like(residual, dtype=torch.float16)
    norm = norm_between_rotations if weights.rotates_residual else rms_norm_many
    norm(residual, weights.norm_f, weights.config.norm_eps, normed)
    return normed


def bytes_per_token(config: MambaConfig) -> int:
    """Return what the buffers of a chunk take for each of its tokens, embeddings and residual stream among them."""
    c = config
    return (4 + 4 + 2) * c.d_model + (4 + 2 + 4 + 2 + 2) * c.d_inner + 4 * (c.dt_rank + 2 * c.d_state) + 2 * c.dt_rank


class _Room:
    """Buffers of one chunk, shared by all layers."""

    def __init__(self, weights: GpuWeights, seq: int) -> None:
        c = weights.config

        def room(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(seq, width, dtype=dtype, device=weights.device)

        self.normed = room(c.d_model, torch.float16)
        self.xz = room(2 * c.d_inner, torch.float16)
        self.u = room(c.d_inner, torch.float16)
        self.projected = room(c.dt_rank + 2 * c.d_state, torch.float32)
        self.low = room(c.dt_rank, torch.float16)
        self.dt = room(c.d_inner, torch.float32)
        self.y = room(c.d_inner, torch.float16)
        self.turned = room(c.d_inner, torch.float16) if weights.rotates_out_proj else self.y


def _layer(
    weights: GpuWeights,
    layer: GpuLayer,
    sequential: Sequential,
    room: _Room,
    residual: torch.Tensor,
    state: GpuState,
    index: int,
) -> None:
    c = weights.config
    conv, ssm = (tensor[index] for tensor in state.tensors)
    rms_norm_many(residual, layer.norm, c.norm_eps, room.normed)
    multiply_many(layer.in_proj, room.normed, room.xz)
    x, z = room.xz[:, : c.d_inner], room.xz[:, c.d_inner :]
    sequential.convolution.run(x, conv, layer.taps, layer.conv_bias, room.u)
    multiply_many(layer.x_proj, room.u, room.projected)
    low, B, C = room.projected.split([c.dt_rank, c.d_state, c.d_state], dim=1)
    room.low.copy_(low.clamp(-_LARGEST, _LARGEST))
    multiply_many(layer.dt_proj, room.low, room.dt)
    sequential.scan.run(room.u, room.dt, layer.A, B, C, layer.D, z, layer.dt_bias, ssm, room.y)
    if weights.rotates_out_proj:
        rotate_many(room.y, room.turned)
    multiply_many(layer.out_proj, room.turned, residual, add=True)
