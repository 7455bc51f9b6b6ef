"""A decoder's matrix on a GPU, in the bundle's own bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ....formats.packing import QuantizedTensor

FLOAT_BITS = 16


@dataclass(frozen=True, eq=False)
class GpuMatrix:
    """A matrix (out, in) that products read.

    Attributes:
        codes: (out, in · bits / 8) uint8, packed as docs/bundle.md says; where there are no codes the matrix itself, (out, in)
            float16.
        scales: (out, in / group) float16; None without codes.
        bits: of a code: 3, 4 or 8; 16 without codes.
        group: inputs that share a scale.
        shape: (out, in).
    """

    codes: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    group: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, value: np.ndarray | QuantizedTensor, device: torch.device) -> GpuMatrix:
        """Copy a stored matrix to the GPU; its codes are of format "int", a float one becomes float16."""
        if isinstance(value, QuantizedTensor):
            assert value.scheme.code_format == "int", f"{value.scheme.name} is not stored in codes of ours"
            bits, group = value.scheme.weight_bits, value.scheme.group(value.shape[1])
            return cls(_on(value.codes, device), _on(value.scales, device), bits, group, value.shape)
        out, n_in = value.shape
        return cls(_on(np.asarray(value, np.float16), device), None, FLOAT_BITS, n_in, (out, n_in))

    def dequantize(self) -> torch.Tensor:
        """Return the matrix, (out, in) float32 on the same device, by plain torch: every kernel's reference begins here."""
        if self.scales is None:
            return self.codes.float()
        out, n_in = self.shape
        codes = _unpacked(self.codes, self.bits).reshape(out, n_in // self.group, self.group)
        centred = codes.float() - float(1 << (self.bits - 1))
        return (centred * self.scales.float()[..., None]).reshape(out, n_in)


def _on(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; one that is mapped read-only is not shared with torch even on a processor."""
    return torch.tensor(array, device=device)


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (out, in) uint8 from packed ones, by the rule in docs/bundle.md."""
    if bits == 8:
        return packed
    out = packed.shape[0]
    if bits == 4:
        blocks = packed.reshape(out, -1, 16)
        return torch.stack([blocks & 15, blocks >> 4], dim=2).reshape(out, -1)
    assert bits == 3
    blocks = packed.reshape(out, -1, 24)
    low = torch.stack([(blocks[..., :16] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(out, -1, 64)
    top = torch.stack([(blocks[..., 16:] >> shift) & 1 for shift in range(8)], dim=2).reshape(out, -1, 64)
    return (low | top << 2).reshape(out, -1)
