"""The product for many tokens, and looking up rows, beside their references."""

from __future__ import annotations

import pytest
import torch

from cobra_edge.decode.cuda.kernels.embedding import look_up, look_up_reference
from cobra_edge.decode.cuda.kernels.gemm import multiply_many, multiply_many_reference

from ...tolerance import assert_close
from .gpu_case import GPU, guarded, random_matrix

SHAPES = [
    ("fp16", 33, 8),
    ("fp16", 70, 100),
    ("w8a16-channel", 17, 160),
    ("w8a16-g128", 130, 384),
    ("w4a16-g128", 63, 640),
    ("w4a16-g64", 129, 64),
    ("w4a16-g32", 1, 96),
    ("w3a16-g64", 40, 320),
]


@pytest.mark.parametrize("name, n_out, n_in", SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_it_is_the_product(name: str, n_out: int, n_in: int, tokens: int) -> None:
    matrix = random_matrix(name, n_out, n_in)
    generator = torch.Generator().manual_seed(tokens)
    # Rows that lie apart: between those of x lies what must not be read, between those of out what must not be written.
    x = torch.full((tokens, n_in + 8), torch.nan, dtype=torch.float16, device=GPU)[:, :n_in]
    x.copy_(torch.randn(tokens, n_in, generator=generator))
    wide, whole = guarded(tokens, n_out + 3)
    out = wide[:, :n_out]
    expected = torch.empty(tokens, n_out, device=GPU)
    multiply_many(matrix, x, out)
    multiply_many_reference(matrix, x, expected)
    assert_close(out.cpu().numpy(), expected.cpu().numpy(), "product", "float16")
    assert torch.isnan(wide[:, n_out:]).all() and torch.isnan(whole[wide.numel() :]).all()


@pytest.mark.parametrize("name", ["fp16", "w8a16-channel", "w4a16-g32"])
def test_it_adds(name: str) -> None:
    matrix = random_matrix(name, 40, 96)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 96, generator=generator).half().to(GPU)
    out = torch.randn(20, 40, generator=generator).to(GPU)
    expected = out.clone()
    multiply_many(matrix, x, out, add=True)
    multiply_many_reference(matrix, x, expected, add=True)
    assert_close(out.cpu().numpy(), expected.cpu().numpy(), "product", "float16")


def test_what_is_too_large_for_float16_becomes_the_largest() -> None:
    matrix = random_matrix("w4a16-g64", 24, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).mul(1e5).clamp(-65504, 65504).half().to(GPU)
    out, _ = guarded(5, 24, dtype=torch.float16)
    expected = torch.empty_like(out)
    multiply_many(matrix, x, out)
    multiply_many_reference(matrix, x, expected)
    assert (expected.abs() == 65504).any() and (expected.abs() < 65504).any()
    assert_close(out.cpu().numpy(), expected.cpu().numpy(), "product", "float16")


@pytest.mark.parametrize("name, n_out, n_in", [*SHAPES, ("w3a16-g64", 9, 2112), ("w4a16-g128", 9, 1152)])
def test_rows_are_those_of_the_matrix(name: str, n_out: int, n_in: int) -> None:
    matrix = random_matrix(name, n_out, n_in)
    tokens = torch.tensor([n_out - 1, 0, n_out // 2, 0], device=GPU)
    wide, whole = guarded(4, n_in + 5)
    out = wide[:, :n_in]
    expected = torch.empty(4, n_in, device=GPU)
    look_up(matrix, tokens, out)
    look_up_reference(matrix, tokens, expected)
    assert torch.equal(out, expected)
    assert torch.isnan(wide[:, n_in:]).all() and torch.isnan(whole[wide.numel() :]).all()
