"""A bundle's bitsandbytes codes run by bitsandbytes' own products, everything else by the torch reference.

in_proj, x_proj, out_proj and the head are multiplied from the stored codes, which are neither dequantized as a whole nor made
anew; rows of a quantized embedding are dequantized when they are looked up; matrices of other formats, and dt_proj, which torch
multiplies without a module of its own, are dequantized. "nf4": float32 products. "int8-rows": LLM.int8 as
`bitsandbytes.nn.Linear8bitLt` does it by default: activations pass through float16 and are rounded to 8 bits, one scale a
token, without the decomposition of outliers (threshold 0). With it, a token's result would depend on its neighbours: every
column that is loud in any token of a call is taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bundle import Bundle
from ..packing import NF4_LEVELS, QuantizedTensor
from ..quantize.bitsandbytes_codes import load_bitsandbytes
from ..scheme import CodeFormat
from .torch_reference import TorchDecoder

_EMBEDDING = "backbone.embedding"
_HEAD = "lm_head"
_PROJECTIONS = (".in_proj", ".x_proj", ".out_proj")
# x (..., in) float32 -> (..., out) float32
Product = Callable[[Tensor], Tensor]


class BitsAndBytesDecoder(TorchDecoder):
    """The torch reference with bitsandbytes in the place of its products."""

    name = "bitsandbytes"

    def __init__(self, bundle: Bundle) -> None:
        """Read the decoder; for a moment it lies in memory as float32 too.

        Raises:
            BundleError: a tensor does not fit. MachineError: bitsandbytes is not installed.
        """
        super().__init__(bundle)
        bnb = load_bitsandbytes()
        for name, value in bundle.decoder_tensors().items():
            if isinstance(value, QuantizedTensor) and value.scheme.code_format in PRODUCTS:
                self._take_over(bnb, name.removesuffix(".weight"), value)

    def _take_over(self, bnb: Any, name: str, value: QuantizedTensor) -> None:
        product = PRODUCTS[value.scheme.code_format]
        if name == _EMBEDDING:
            _replace_forward(self.model.backbone.embedding, _lookup(value))
            if self.config.tied:
                _replace_forward(self.model.lm_head, product(bnb, value))
        elif name == _HEAD or name.endswith(_PROJECTIONS):
            _replace_forward(self.model.get_submodule(name), product(bnb, value))


def _replace_forward(module: nn.Module, forward: Product) -> None:
    """Have the module compute something else, and let go of its weight; its hooks stay."""
    module.forward = forward
    del module.weight


def _lookup(table: QuantizedTensor) -> Product:
    def rows(tokens: Tensor) -> Tensor:
        found = table.rows(tokens.numpy().reshape(-1)).dequantize()
        return torch.from_numpy(found).reshape(*tokens.shape, -1)

    return rows


def nf4_product(bnb: Any, weight: QuantizedTensor) -> Product:
    """Return the product with a matrix of format "nf4"."""
    codes = torch.from_numpy(np.array(weight.codes))
    state = bnb.functional.QuantState(
        absmax=torch.from_numpy(np.array(weight.scales)).reshape(-1),
        shape=torch.Size(weight.shape),
        code=torch.tensor(NF4_LEVELS),
        blocksize=weight.scheme.group_size,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return lambda x: bnb.matmul_4bit(x, codes, quant_state=state)


def int8_product(bnb: Any, weight: QuantizedTensor) -> Product:
    """Return the product with a matrix of format "int8-rows"; activations are rounded, see above."""
    state = bnb.MatmulLtState()
    state.CB = torch.from_numpy(np.array(weight.codes))
    state.SCB = torch.from_numpy(np.array(weight.scales)).reshape(-1)
    state.has_fp16_weights = state.is_training = False

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # bitsandbytes takes no single vector
        return bnb.matmul(rows, state.CB, state=state).reshape(*x.shape[:-1], -1)

    return product


PRODUCTS: dict[CodeFormat, Callable[[Any, QuantizedTensor], Product]] = {"nf4": nf4_product, "int8-rows": int8_product}
