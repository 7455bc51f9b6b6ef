"""The product for one token beside its reference."""

from __future__ import annotations

import pytest
import torch

from cobra_edge.decode.cuda.kernels.gemv import _warps, multiply_one, multiply_one_reference
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.scheme import SCHEMES

from ...tolerance import assert_close
from .gpu_case import GPU, guarded, random_matrix

SHAPES = [
    ("fp16", 33, 100),
    ("fp16", 16, 24),
    ("w8a16-channel", 48, 96),
    ("w8a16-channel", 17, 512),
    ("w8a16-g128", 20, 384),
    ("w4a16-g128", 33, 640),
    ("w4a16-g64", 63, 64),
    ("w4a16-g32", 1, 96),
    ("w4a16-g32", 8, 1024),
    ("w3a16-g64", 19, 64),
    ("w3a16-g64", 18, 576),
]


@pytest.mark.parametrize("name, n_out, n_in", SHAPES)
@pytest.mark.parametrize("normed, add", [(True, False), (False, True)])
def test_it_is_the_product(name: str, n_out: int, n_in: int, normed: bool, add: bool) -> None:
    matrix = random_matrix(name, n_out, n_in)
    generator = torch.Generator().manual_seed(n_in)
    x = torch.randn(n_in, generator=generator).to(GPU)
    norm = torch.rand(n_in, generator=generator).to(GPU) + 0.5 if normed else None
    out, whole = guarded(n_out)
    expected = torch.full_like(out, torch.nan)
    if add:
        out.copy_(torch.randn(n_out, generator=generator))
        expected.copy_(out)
    multiply_one(matrix, x, out, norm=norm, eps=0.1, add=add)
    multiply_one_reference(matrix, x, expected, norm=norm, eps=0.1, add=add)
    assert_close(out.cpu().numpy(), expected.cpu().numpy(), "product")
    assert torch.isnan(whole[n_out:]).all()


def test_its_reference_is_the_product_of_the_stored_matrix() -> None:
    matrix = random_matrix("w3a16-g64", 8, 128)
    x, out = torch.randn(128, generator=torch.Generator().manual_seed(0)).to(GPU), torch.empty(8, device=GPU)
    multiply_one_reference(matrix, x, out)
    assert matrix.scales is not None
    stored = QuantizedTensor(matrix.codes.cpu().numpy(), matrix.scales.cpu().numpy(), SCHEMES["w3a16-g64"])
    assert_close(out.cpu().numpy(), stored.dequantize() @ x.cpu().numpy(), "product")


def test_warps_have_equal_turns() -> None:
    assert _warps(640, 80, 1280) == 2  # enough
    assert _warps(160, 160, 1280) == 4  # eight would have turns with nothing to do
    assert _warps(160, 320, 1280) == 8
    assert _warps(1, 4096, 1280) == 8
    assert _warps(640, 40, 1280) == 1
