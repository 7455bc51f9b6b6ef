"""One token's recurrence, against its reference and the model's scan."""

import pytest
import torch

from cobra_edge.decode.cuda.kernels.selective_state_update import recur_and_gate, recur_and_gate_reference
from cobra_edge.model.mamba import selective_scan

from ...tolerance import assert_close
from .kernel_case import guarded


@pytest.mark.parametrize(
    "n_slices, d_inner, dt_rank, d_state", [(1, 96, 8, 16), (5, 130, 160, 16), (3, 70, 5, 8), (2, 32, 1, 3)]
)
def test_one_layer_of_three(n_slices, d_inner, dt_rank, d_state):
    torch.manual_seed(d_inner)
    partials = torch.randn(n_slices, dt_rank + 2 * d_state)
    dt_weight, dt_bias = (torch.randn(d_inner, dt_rank) * dt_rank**-0.5).half(), torch.randn(d_inner) - 4
    A, D = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1) * torch.rand(d_inner, 1), torch.randn(d_inner)
    xz, u = torch.randn(2 * d_inner), torch.randn(d_inner)
    before = torch.randn(3, d_inner, d_state)
    state, reference_state = guarded(3, d_inner, d_state), before.clone()
    state.tensor.copy_(before)
    y, reference = guarded(d_inner), torch.empty(d_inner)
    cell = torch.tensor([state.tensor.data_ptr()])
    recur_and_gate(partials, dt_weight, dt_bias, A, D, xz, u, cell, 1, y.tensor)
    recur_and_gate_reference(partials, dt_weight, dt_bias, A, D, xz, u, reference_state, 1, reference)
    assert_close(y.checked(), reference.numpy(), "scan")
    assert_close(state.checked()[1], reference_state[1].numpy(), "scan")
    assert torch.equal(state.tensor[[0, 2]], before[[0, 2]])

    low, B, C = partials.sum(0).split([dt_rank, d_state, d_state])
    dt = dt_weight.float() @ low
    rows = [t[None, None] for t in (u, dt, B, C, xz[d_inner:])]
    model_y, h = selective_scan(rows[0], rows[1], A, rows[2], rows[3], D, rows[4], dt_bias, before[1][None])
    assert_close(reference.numpy(), model_y[0, 0].numpy(), "scan")
    assert_close(reference_state[1].numpy(), h[0].numpy(), "scan")
