"""Decoder backend for bitsandbytes' formats: its matmuls run on the stored codes, everything else by the torch reference.

in_proj, x_proj, out_proj and the head are multiplied from the stored codes, without dequantizing or requantizing the matrix.
Rows of a quantized embedding are dequantized on lookup. Matrices in other formats, and dt_proj, which torch multiplies without
a module, are dequantized. "nf4": float32 matmuls. "int8-rows": LLM.int8 with the defaults of `bitsandbytes.nn.Linear8bitLt`:
activations are cast to float16 and rounded to 8 bits, one scale per token, without the decomposition of outliers (threshold 0).
With it, a token's result would depend on the other tokens: every column with an outlier in any token of a call is taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..bundle.reader import Bundle
from ..formats.bitsandbytes_codes import load_bitsandbytes
from ..formats.packing import NF4_LEVELS, QuantizedTensor
from ..formats.scheme import CodeFormat
from .torch_reference import Forward, TorchDecoder

_CPU = torch.device("cpu")


class BitsAndBytesDecoder(TorchDecoder):
    """The torch reference with bitsandbytes' matmuls."""

    name = "bitsandbytes"

    def __init__(self, bundle: Bundle, device: torch.device = _CPU) -> None:
        """Load the decoder.

        Raises:
            BundleError: a tensor does not match. MachineError: bitsandbytes is not installed.
        """
        self._bnb = load_bitsandbytes()
        super().__init__(bundle, device)

    def _multiplies_codes(self, value: QuantizedTensor) -> bool:
        return value.scheme.code_format in MATMULS or super()._multiplies_codes(value)

    def _matmul_with(self, value: QuantizedTensor) -> Forward:
        matmul = MATMULS.get(value.scheme.code_format)
        return super()._matmul_with(value) if matmul is None else matmul(self._bnb, value, self.device)


def nf4_matmul(bnb: Any, weight: QuantizedTensor, device: torch.device = _CPU) -> Forward:
    """Return the matmul with a matrix of format "nf4"."""
    codes = torch.from_numpy(np.array(weight.codes)).to(device)
    state = bnb.functional.QuantState(
        absmax=torch.from_numpy(np.array(weight.scales)).reshape(-1).to(device),
        shape=torch.Size(weight.shape),
        code=torch.tensor(NF4_LEVELS, device=device),
        blocksize=weight.scheme.group_size,
        quant_type="nf4",
        dtype=torch.float32,
    )
    return lambda x: bnb.matmul_4bit(x, codes, quant_state=state)


def int8_matmul(bnb: Any, weight: QuantizedTensor, device: torch.device = _CPU) -> Forward:
    """Return the matmul with a matrix of format "int8-rows", which quantizes activations (see above)."""
    state = bnb.MatmulLtState()
    state.CB = torch.from_numpy(np.array(weight.codes)).to(device)
    state.SCB = torch.from_numpy(np.array(weight.scales)).reshape(-1).to(device)
    state.has_fp16_weights = state.is_training = False

    def matmul(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # bitsandbytes does not support single vectors
        return bnb.matmul(rows, state.CB, state=state).reshape(*x.shape[:-1], -1)

    return matmul


MATMULS: dict[CodeFormat, Callable[[Any, QuantizedTensor, torch.device], Forward]] = {
    "nf4": nf4_matmul,
    "int8-rows": int8_matmul,
}
