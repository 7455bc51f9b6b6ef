"""What kernels do to single numbers, digit by digit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from cobra_edge.decode.cuda.kernels.elementwise import (
    silu,
    silu_reference,
    softplus,
    softplus_reference,
    stored,
    stored_reference,
)


@triton.jit
def _each(x, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    if OPERATION == 0:
        value = silu(value)
    if OPERATION == 1:
        value = softplus(value)
    tl.store(out + i, stored(value, out.dtype.element_ty))


def each(operation: int, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full_like(x, float("nan"), dtype=dtype)
    _each[(1,)](x, out, OPERATION=operation, SIZE=len(x))
    return out


def test_softplus_keeps_its_digits_where_it_is_small_and_does_not_overflow():
    x = torch.cat([torch.linspace(-80, 5, 1020), torch.tensor([-1e4, 20.0, 90.0, 1e30])])
    exact = np.logaddexp(0.0, x.double().numpy())
    assert each(1, x).numpy() == pytest.approx(exact, rel=1e-6, abs=1e-37)
    assert softplus_reference(x).numpy() == pytest.approx(exact, rel=1e-6, abs=1e-8)


def test_silu():
    x = torch.cat([torch.linspace(-30, 30, 252), torch.tensor([-1e4, -200.0, 200.0, 1e30])])
    exact = x.double().numpy() / (1 + np.exp(np.minimum(-x.double().numpy(), 700)))
    assert each(0, x).numpy() == pytest.approx(exact, rel=1e-5, abs=1e-37)
    assert silu_reference(x).numpy() == pytest.approx(exact, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_stored(dtype):
    x = torch.tensor([65503.0, 65519.0, 70000.0, -1e30, float("inf"), float("-inf"), 1e-9, float("nan")])
    got = each(2, x, dtype)
    assert torch.equal(got.nan_to_num(-1.0), stored_reference(x, dtype).nan_to_num(-1.0))
    if dtype == torch.float16:
        assert got[:6].tolist() == [65504, 65504, 65504, -65504, 65504, -65504] and got[7].isnan()
