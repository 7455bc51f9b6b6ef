"""The scan over many tokens, against its reference and the model's own, in one chunk and in several."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cobra_edge.decode.cuda.kernels import scan
from cobra_edge.decode.cuda.kernels.launch import recording
from cobra_edge.decode.cuda.kernels.scan import scan_many, scan_many_reference
from cobra_edge.model.mamba import selective_scan

from ...tolerance import assert_close
from .kernel_case import guarded


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a scan reads, laid out as a decoder does: views into wider rows."""

    u: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor
    z: torch.Tensor
    dt_bias: torch.Tensor
    h: torch.Tensor

    @classmethod
    def random(cls, tokens: int, d_inner: int, d_state: int, dtype: torch.dtype, rank: int = 8) -> "Inputs":
        torch.manual_seed(tokens)
        projected = torch.randn(tokens, rank + 2 * d_state)
        return cls(
            torch.randn(tokens, d_inner).to(dtype),
            torch.randn(tokens, d_inner),
            -torch.arange(1.0, d_state + 1).repeat(d_inner, 1) * torch.rand(d_inner, 1),
            projected[:, rank : rank + d_state],
            projected[:, rank + d_state :],
            torch.randn(d_inner),
            torch.randn(tokens, 2 * d_inner).to(dtype)[:, d_inner:],
            torch.randn(d_inner) - 4,
            torch.randn(d_inner, d_state),
        )

    def but_h(self) -> tuple[torch.Tensor, ...]:
        return self.u, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    sizes = {"CHUNK": 16, "BLOCK_C": 128, "num_warps": 1}
    monkeypatch.setattr(scan, "sizes_for", lambda *_: sizes)


def check(inputs: Inputs, kind: str) -> np.ndarray:
    dtype = getattr(torch, kind)
    moved, reference_moved = guarded(*inputs.h.shape), inputs.h.clone()
    moved.tensor.copy_(inputs.h)
    got, reference = guarded(*inputs.u.shape, dtype=dtype), torch.empty(inputs.u.shape, dtype=dtype)
    scan_many(*inputs.but_h(), moved.tensor, got.tensor)
    scan_many_reference(*inputs.but_h(), reference_moved, reference)
    assert_close(got.checked(), reference.numpy(), "scan", kind)
    assert_close(moved.checked(), reference_moved.numpy(), "scan")
    batched = [t[None] if t.shape[0] == len(inputs.u) and t.dim() == 2 else t for t in inputs.but_h()]
    y, h = selective_scan(*batched, inputs.h[None])
    assert_close(reference.numpy(), y[0].numpy(), "scan", kind)
    assert_close(reference_moved.numpy(), h[0].numpy(), "scan")
    return got.checked()


@pytest.mark.parametrize(
    "tokens, kind", [(1, "float32"), (16, "float32"), (17, "float32"), (63, "float32"), (129, "float32"), (33, "float16")]
)
def test_any_number_of_chunks(tokens, kind):
    check(Inputs.random(tokens, 96, 16, getattr(torch, kind)), kind)


@pytest.mark.parametrize("d_inner, d_state", [(130, 8), (70, 5), (128, 1)])
def test_widths_that_are_no_powers_of_two(d_inner, d_state):
    check(Inputs.random(40, d_inner, d_state, torch.float32), "float32")


def test_a_gpu_that_channels_alone_fill_runs_one_chunk(monkeypatch):
    inputs = Inputs.random(40, 130, 16, torch.float32)
    with recording() as launches:
        scan_many(*inputs.but_h(), inputs.h, torch.empty(40, 130))
    assert [launch.grid for launch in launches] == [(2, 2), (2, 3)]
    monkeypatch.setattr(scan, "_enough_programs", lambda _: 2)
    with recording() as launches:
        scan_many(*inputs.but_h(), inputs.h, torch.empty(40, 130))
    assert [launch.grid for launch in launches] == [(2, 1)]
    check(inputs, "float32")


def test_a_column_major_a_is_read_by_its_strides():
    inputs = Inputs.random(20, 96, 16, torch.float32)
    row_major, column_major = torch.empty(20, 96), torch.empty(20, 96)
    scan_many(*inputs.but_h(), inputs.h.clone(), row_major)
    u, dt, A, *others = inputs.but_h()
    scan_many(u, dt, A.T.contiguous().T, *others, inputs.h.clone(), column_major)
    assert torch.equal(row_major, column_major)


def test_steps_from_tiny_to_huge_keep_their_digits():
    inputs = Inputs.random(33, 96, 16, torch.float32)
    inputs.dt.copy_(torch.linspace(-30, 90, 33)[:, None].expand(-1, 96))
    inputs.dt_bias.zero_()
    check(inputs, "float32")
