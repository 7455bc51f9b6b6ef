"""The norm of many rows, against its reference and the model's own."""

import pytest
import torch

from cobra_edge.decode.cuda.kernels.norm import rms_norm_many, rms_norm_many_reference
from cobra_edge.model.mamba import RMSNorm

from ...tolerance import assert_close
from .kernel_case import guarded


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("tokens, d", [(1, 64), (63, 96), (5, 500)])
def test_rows_apart(tokens, d, kind):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(tokens, 2 * d)[:, :d], 1 + 0.1 * torch.randn(d)
    dtype = getattr(torch, kind)
    got, reference = guarded(tokens, d, dtype=dtype), torch.empty(tokens, d, dtype=dtype)
    rms_norm_many(x, weight, 1e-5, got.tensor)
    rms_norm_many_reference(x, weight, 1e-5, reference)
    model = RMSNorm(d, 1e-5)
    model.weight.data = weight
    assert_close(got.checked(), reference.numpy(), "norm", kind)
    assert_close(reference.numpy(), model(x).detach().numpy(), "norm", kind)


def test_what_float16_cannot_hold_is_its_largest():
    x = torch.zeros(1, 96)
    x[0, :2] = torch.tensor([1.0, -1.0])
    out = guarded(1, 96, dtype=torch.float16)
    rms_norm_many(x, torch.full((96,), 1e6), 1e-5, out.tensor)
    assert out.checked()[0, :2].tolist() == [65504, -65504]


def test_what_is_not_a_number_stays_so():
    out = torch.zeros(1, 96, dtype=torch.float16)
    rms_norm_many(torch.full((1, 96), float("nan")), torch.ones(96), 1e-5, out)
    assert out.isnan().all()
