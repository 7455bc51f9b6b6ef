"""A step's convolution and its products with x_proj beside their reference."""

from __future__ import annotations

import pytest
import torch

from cobra_edge.decode.cuda.kernels.conv_step import convolve_and_project, convolve_and_project_reference, n_slices

from ...tolerance import assert_close
from .gpu_case import GPU, guarded, random_matrix


@pytest.mark.parametrize(
    "name, n_rows, n_inner, n_taps",
    [
        ("fp16", 24, 96, 4),
        ("fp16", 7, 130, 2),
        ("w8a16-channel", 40, 160, 3),
        ("w8a16-g128", 24, 256, 4),
        ("w4a16-g128", 33, 384, 4),
        ("w4a16-g64", 24, 192, 3),
        ("w4a16-g32", 192, 96, 4),
        ("w3a16-g64", 24, 320, 2),
    ],
)
def test_tokens_in_turn(name: str, n_rows: int, n_inner: int, n_taps: int) -> None:
    matrix = random_matrix(name, n_rows, n_inner)
    generator = torch.Generator().manual_seed(n_inner)
    windows, whole = guarded(3, n_inner, n_taps)
    windows.copy_(torch.randn(windows.shape, generator=generator))
    expected_windows = windows.clone()
    weight, bias = (torch.randn(*shape, generator=generator).to(GPU) for shape in ((n_inner, n_taps), (n_inner,)))
    cell = torch.tensor([windows.data_ptr()], device=GPU)
    u, whole_u = guarded(n_inner)
    partials, whole_partials = guarded(n_slices(matrix), n_rows)
    expected_u, expected_partials = torch.empty_like(u), torch.empty_like(partials)
    for layer in (1, 1, 2):
        xz = torch.randn(2 * n_inner, generator=generator).to(GPU)
        convolve_and_project(matrix, xz, cell, layer, weight, bias, u, partials)
        convolve_and_project_reference(matrix, xz, expected_windows, layer, weight, bias, expected_u, expected_partials)
        assert_close(u.cpu().numpy(), expected_u.cpu().numpy(), "product")
        assert_close(partials.cpu().numpy(), expected_partials.cpu().numpy(), "product")
        assert torch.equal(windows, expected_windows)
    for guard in (whole[windows.numel() :], whole_u[n_inner:], whole_partials[partials.numel() :]):
        assert torch.isnan(guard).all()


def test_slices_add_up_to_the_product() -> None:
    matrix = random_matrix("w4a16-g128", 24, 384)
    windows, u = torch.zeros(1, 384, 2, device=GPU), torch.empty(384, device=GPU)
    partials = torch.empty(n_slices(matrix), 24, device=GPU)
    xz = torch.randn(768, generator=torch.Generator().manual_seed(0)).to(GPU)
    weight, bias = torch.ones(384, 2, device=GPU), torch.zeros(384, device=GPU)
    convolve_and_project_reference(matrix, xz, windows, 0, weight, bias, u, partials)
    assert len(partials) > 1
    assert_close(partials.sum(dim=0).cpu().numpy(), (matrix.dequantize() @ u).cpu().numpy(), "product")
