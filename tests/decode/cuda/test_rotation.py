"""Rotations on a GPU, against their references and the one that writes bundles."""

import numpy as np
import pytest
import torch

from cobra_edge.decode.cuda.kernels.rotation import (
    norm_between_rotations,
    norm_between_rotations_reference,
    rotate_many,
    rotate_many_reference,
)
from cobra_edge.errors import InputError
from cobra_edge.formats.hadamard import rotate, unrotate

from ...tolerance import assert_close
from .kernel_case import guarded

WIDTHS = [1, 2, 64, 96, 160, 352, 2560]  # m = 1, 1, 1, 12, 20, 44, 20


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_apart(tokens, width, back):
    torch.manual_seed(0)
    x = torch.randn(tokens, 2 * width)[:, width:]
    got, reference = guarded(tokens, width), torch.empty(tokens, width)
    rotate_many(x, got.tensor, back=back)
    rotate_many_reference(x, reference, back=back)
    assert_close(got.checked(), reference.numpy(), "rotation")
    assert_close(got.checked(), (unrotate if back else rotate)(x.numpy()), "rotation")


def test_float16_in_and_out():
    torch.manual_seed(0)
    x = torch.randn(2, 160).half()
    out = guarded(2, 160, dtype=torch.float16)
    rotate_many(x, out.tensor)
    assert_close(out.checked(), rotate(x.float().numpy()), "rotation", "float16")
    rotate_many(torch.full((2, 160), 60000.0).half(), out.tensor)
    assert np.abs(out.checked()).max() == 65504


@pytest.mark.parametrize(
    "width, kind", [(64, "float32"), (96, "float32"), (160, "float32"), (352, "float32"), (160, "float16")]
)
def test_a_norm_between_rotations(width, kind):
    torch.manual_seed(1)
    dtype = getattr(torch, kind)
    x, weight = torch.randn(2, width) * torch.linspace(0.1, 9, width), 1 + torch.randn(width)
    got, reference = guarded(2, width, dtype=dtype), torch.empty(2, width, dtype=dtype)
    norm_between_rotations(x, weight, 1e-5, got.tensor)
    norm_between_rotations_reference(x, weight, 1e-5, reference)
    assert_close(got.checked(), reference.numpy(), "rotation", kind)
    upright = unrotate(x.numpy())
    normed = upright / np.sqrt((upright**2).mean(-1, keepdims=True) + 1e-5) * weight.numpy()
    assert_close(got.checked(), rotate(normed), "rotation", kind)


def test_a_width_without_a_hadamard_matrix_is_refused():
    with pytest.raises(InputError, match="width 36 has no Hadamard matrix"):
        rotate_many(torch.zeros(1, 36), torch.zeros(1, 36))
