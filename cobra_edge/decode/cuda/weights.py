"""A bundle's decoder on a GPU: codes in the bundle's own bytes, small tensors as float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...formats.model_config import MambaConfig
from ...formats.packing import QuantizedTensor
from ...formats.recipe import Recipe, quantized_scheme, stored_tensors
from ..decoder import Weights
from .kernels.matrix import GpuMatrix

_EMBEDDING, _HEAD = "backbone.embedding.weight", "lm_head.weight"


@dataclass(frozen=True, eq=False)
class GpuLayer:
    """One layer's tensors on the GPU.

    Attributes:
        norm: (d_model,) float32.
        in_proj, x_proj, out_proj: (2·d_inner, d_model), (dt_rank + 2·d_state, d_inner), (d_model, d_inner).
        dt_proj: (d_inner, dt_rank), float16 whatever it is stored as: it is small, and read beside the recurrence.
        taps, conv_bias: (d_inner, d_conv) and (d_inner,) float32, of the convolution.
        A: (d_inner, d_state) float32, negative: -exp(A_log).
        D, dt_bias: (d_inner,) float32.
    """

    norm: torch.Tensor
    in_proj: GpuMatrix
    taps: torch.Tensor
    conv_bias: torch.Tensor
    x_proj: GpuMatrix
    dt_proj: GpuMatrix
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor
    out_proj: GpuMatrix


@dataclass(frozen=True, eq=False)
class GpuWeights:
    """All of a decoder on a GPU.

    Attributes:
        config: sizes.
        layers: in order.
        embedding, head: (vocab, d_model); the same object where they are tied.
        norm_f: (d_model,) float32.
        rotates_residual, rotates_out_proj: what the recipe rotates.
        device: where all of it is.
    """

    config: MambaConfig
    layers: tuple[GpuLayer, ...]
    embedding: GpuMatrix
    head: GpuMatrix
    norm_f: torch.Tensor
    rotates_residual: bool
    rotates_out_proj: bool
    device: torch.device

    @classmethod
    def of(cls, weights: Weights, device: torch.device) -> GpuWeights:
        """Copy a decoder's weights to a device, tensor after tensor. torch says when there is no room."""
        config, tensors = weights.config, weights.tensors
        embedding = GpuMatrix.of(tensors[_EMBEDDING], device)
        return cls(
            config,
            tuple(_layer(tensors, f"backbone.layers.{i}.", device) for i in range(config.n_layer)),
            embedding,
            embedding if config.tied else GpuMatrix.of(tensors[_HEAD], device),
            _float(tensors["backbone.norm_f.weight"], device),
            weights.recipe.rotates_residual,
            weights.recipe.rotates_out_proj,
            device,
        )


def _layer(tensors: Mapping[str, np.ndarray | QuantizedTensor], prefix: str, device: torch.device) -> GpuLayer:
    mixer = prefix + "mixer."

    def matrix(name: str) -> GpuMatrix:
        return GpuMatrix.of(tensors[f"{mixer}{name}.weight"], device)

    def small(name: str) -> torch.Tensor:
        return _float(tensors[mixer + name], device)

    return GpuLayer(
        norm=_float(tensors[prefix + "norm.weight"], device),
        in_proj=matrix("in_proj"),
        taps=small("conv1d.weight").squeeze(1),
        conv_bias=small("conv1d.bias"),
        x_proj=matrix("x_proj"),
        dt_proj=_as_float16(matrix("dt_proj")),
        dt_bias=small("dt_proj.bias"),
        A=-torch.exp(small("A_log")),
        D=small("D"),
        out_proj=matrix("out_proj"),
    )


def _float(value: np.ndarray | QuantizedTensor, device: torch.device) -> torch.Tensor:
    assert not isinstance(value, QuantizedTensor)
    return torch.tensor(np.asarray(value, np.float32), device=device)


def _as_float16(matrix: GpuMatrix) -> GpuMatrix:
    if matrix.scales is None:
        return matrix
    return GpuMatrix(matrix.dequantize().half(), None, 16, matrix.shape[1], matrix.shape)


def hollow(config: MambaConfig, recipe: Recipe) -> Weights:
    """Return weights of a shape and recipe that take no memory: every tensor is one zero seen many times.

    With torch's "meta" device a decoder of any size can be made of them, to record what it launches.

    Raises:
        InputError: the recipe does not fit the shape.
    """
    tensors: dict[str, np.ndarray | QuantizedTensor] = {}
    for name, entries in stored_tensors(config, recipe).items():
        arrays = {e.name: np.broadcast_to(np.zeros((), e.dtype), e.shape) for e in entries}
        scheme = quantized_scheme(recipe, name)
        if scheme is None:
            tensors[name] = arrays[name]
        else:
            tensors[name] = QuantizedTensor(arrays[f"{name}.codes"], arrays[f"{name}.scales"], scheme)
    return Weights(config, recipe, tensors, "hollow weights")
