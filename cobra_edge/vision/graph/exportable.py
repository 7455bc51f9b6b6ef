"""Rewrite the vision tower into the patterns that runtimes fuse, with matmuls in a precision.

The function stays the same. Attention becomes split, matmul, softmax, matmul, with its scale folded into the query weights; a
layer scale is folded into the preceding matmul; GELU has the node order that onnxruntime recognizes. In 16 bits, matmuls take
16-bit operands and return 16-bit results. Everything else stays float32: norms, GELU and the residual stream, where DINOv2 has
channels hundreds of times larger than the rest (Darcet et al. 2024, "Vision Transformers Need Registers"). The exception is
softmax, which keeps the type of the two matmuls around it, because a GPU fuses the three into one kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...formats.precision import PrecisionName
from ...model.cobra import VisionModel

_DTYPES: dict[PrecisionName, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class _CastLayer(nn.Module):
    """A linear layer or patch embedding with operands of one dtype and a float32 result; parameter names are unchanged."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        layer = layer.to(dtype)
        self.weight, self.bias, self.dtype = layer.weight, layer.bias, dtype
        self.convolution = (layer.stride, layer.padding, layer.groups) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.convolution is None:
            return F.linear(x, self.weight, self.bias).float()
        stride, padding, groups = self.convolution
        return F.conv2d(x, self.weight, self.bias, stride, padding, groups=groups).float()


class _Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5


class _Attention(nn.Module):
    """Self-attention of (1, tokens, width) float32, the scores' scale folded into the queries."""

    def __init__(self, attention: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.width = attention.num_heads, attention.proj.in_features
        with torch.no_grad():
            attention.qkv.weight[: self.width] *= attention.scale
            if attention.qkv.bias is not None:
                attention.qkv.bias[: self.width] *= attention.scale
        self.qkv, self.proj, self.dtype = attention.qkv.to(dtype), attention.proj.to(dtype), dtype

    def forward(self, x: Tensor, **_unused: object) -> Tensor:
        q, k, v = (self._heads(part) for part in self.qkv(x.to(self.dtype)).split(self.width, dim=-1))
        mixed = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2)).float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(1, x.shape[1], self.heads, -1).transpose(1, 2)


def make_exportable(model: VisionModel, precision: PrecisionName) -> None:
    """Rewrite a model in place; its output changes only by rounding.

    Args:
        model: tower and projector in float32.
        precision: of the matmuls: "fp32", "fp16" or "bf16".
    """
    dtype = _DTYPES[precision]
    tower: Any = model.tower
    for encoder in tower.encoders:
        for block in encoder.vit.blocks:
            _fold_layer_scales(block)
            if _is_plain(block.attn):
                block.attn = _Attention(block.attn, dtype)
    _replace_leaves(model, dtype)


def _is_plain(attention: Any) -> bool:
    """Return whether attention has no norms and no gate; otherwise it keeps its form and float32.

    Not every version of timm has all of these attributes.
    """
    between = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    return all(m is None or isinstance(m, nn.Identity) for m in between)


@torch.no_grad()
def _fold_layer_scales(block: Any) -> None:
    for name, layer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
        scale = getattr(block, name)
        if not isinstance(scale, nn.Identity):
            layer.weight *= scale.gamma[:, None]
            layer.bias *= scale.gamma
            setattr(block, name, nn.Identity())


def _replace_leaves(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GELU) and child.approximate == "none":
            setattr(module, name, _Gelu())
        elif isinstance(child, nn.Linear | nn.Conv2d):
            setattr(module, name, _CastLayer(child, dtype))
        elif not isinstance(child, _CastLayer | _Attention):
            _replace_leaves(child, dtype)
