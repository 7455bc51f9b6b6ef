"""The convolution over many tokens, against its reference and the model's own."""

import pytest
import torch

from cobra_edge.decode.cuda.kernels.convolution import convolve_many, convolve_many_reference
from cobra_edge.model.mamba import causal_conv

from ...tolerance import assert_close
from .kernel_case import guarded


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("tokens, d_inner, d_conv", [(1, 96, 4), (2, 96, 4), (3, 200, 2), (63, 130, 3), (129, 96, 4)])
def test_left_halves_of_rows(tokens, d_inner, d_conv, kind):
    torch.manual_seed(0)
    dtype = getattr(torch, kind)
    x = torch.randn(tokens, 2 * d_inner).to(dtype)[:, :d_inner]
    state, weight, bias = torch.randn(d_inner, d_conv), torch.randn(d_inner, d_conv), torch.randn(d_inner)
    moved, reference_moved = guarded(d_inner, d_conv), state.clone()
    moved.tensor.copy_(state)
    got, reference = guarded(tokens, d_inner, dtype=dtype), torch.empty(tokens, d_inner, dtype=dtype)
    convolve_many(x, moved.tensor, weight, bias, got.tensor)
    convolve_many_reference(x, reference_moved, weight, bias, reference)
    assert_close(got.checked(), reference.numpy(), "convolution", kind)
    assert (moved.checked() == reference_moved.numpy()).all()
    model = causal_conv(x[None].float(), state[None], weight, bias)[0]
    assert_close(reference.float().numpy(), model.numpy(), "convolution", kind)


def test_a_prompt_in_two_parts_is_the_prompt():
    torch.manual_seed(1)
    x, weight, bias = torch.randn(40, 96), torch.randn(96, 4), torch.randn(96)
    state, whole, parts = torch.zeros(96, 4), torch.empty(40, 96), torch.empty(40, 96)
    convolve_many(x, state, weight, bias, whole)
    again = torch.zeros(96, 4)
    for start, stop in [(0, 33), (33, 35), (35, 40)]:
        convolve_many(x[start:stop], again, weight, bias, parts[start:stop])
    assert torch.equal(parts, whole) and torch.equal(again, state)
