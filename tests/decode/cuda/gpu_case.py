"""Matrices and outputs for tests of kernels: on a GPU where there is one, else for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cobra_edge.decode.cuda.kernels import tiles
from cobra_edge.decode.cuda.kernels.matrix import GpuMatrix
from cobra_edge.formats.packing import QuantizedTensor, pack
from cobra_edge.formats.scheme import SCHEMES

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_GUARD = 64
# Few large programs: what the interpreter runs soonest. Tests of the kernels themselves keep the table's sizes.
_LARGE = {
    "multiply_one": {"ROWS": 1024, "WARPS": 1},
    "multiply_many": {"OUTS": 1024, "TOKENS": 64, "BYTES": 64},
    "scan_many": {"BLOCK_C": 1024},
    "convolve_many": {"BLOCK_T": 64, "BLOCK_C": 1024},
    "recur_and_gate": {"BLOCK_C": 1024},
}


@contextmanager
def few_programs() -> Iterator[None]:
    """Have kernels cut their work into few programs, where Triton's interpreter runs them one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        if GPU.type == "cpu":
            table = tiles._sizes
            patch.setattr(tiles, "_sizes", lambda kernel, *which: dict(table(kernel, *which)) | _LARGE.get(kernel, {}))
        yield


def random_matrix(scheme_name: str, n_out: int, n_in: int) -> GpuMatrix:
    """Return a matrix (n_out, n_in) of every code and scales of both signs, about as large as a model's."""
    rng = np.random.default_rng(n_out * n_in)
    scheme = SCHEMES[scheme_name]
    if scheme.group_size is None:
        return GpuMatrix.of(rng.standard_normal((n_out, n_in)).astype(np.float32) / 8, GPU)
    codes = rng.integers(0, 1 << scheme.weight_bits, (n_out, n_in), np.uint8)
    scales = rng.standard_normal((n_out, n_in // scheme.group(n_in))).astype(np.float16)
    scales /= np.float16(4 << scheme.weight_bits)
    return GpuMatrix.of(QuantizedTensor(pack(codes, scheme), scales, scheme), GPU)


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor of NaNs, and the flat memory that it begins, which ends in NaNs that nobody may write."""
    n = int(np.prod(shape))
    whole = torch.full((n + _GUARD,), torch.nan, dtype=dtype, device=GPU)
    return whole[:n].view(shape), whole
