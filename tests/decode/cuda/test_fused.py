"""mamba-ssm and causal-conv1d behind our contracts: stand-ins of what they promise, and each reason not to take them."""

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cobra_edge.decode.cuda.kernels import fused
from cobra_edge.decode.cuda.kernels.convolution import convolve_many, convolve_many_reference
from cobra_edge.decode.cuda.kernels.scan import scan_many, scan_many_reference
from cobra_edge.model import fused_kernels

from ...tolerance import assert_close
from .kernel_case import guarded

GPU = torch.device("cuda")


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """Scan (batch, d_inner, seq) from zero, as mamba-ssm says it does, one dtype throughout."""
    assert delta_bias is None and not delta_softplus and return_last_state
    assert {t.dtype for t in (u, delta, A, B, C, D, z)} == {torch.float32} and all(
        t.stride(-1) == 1 for t in (u, delta, B, C, z)
    )
    h, outs = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, None, :, t]
        outs.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(outs, -1) + D[:, None] * u) * F.silu(z), h


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None
):
    """Convolve (batch, d_inner, seq), channels last, after d_conv - 1 inputs, as causal-conv1d says it does."""
    assert seq_idx is None and activation == "silu" and not return_final_states
    width = weight.shape[1]
    assert x.stride(1) == 1 and x.stride(2) > 1 and x.stride(0) % 8 == x.stride(2) % 8 == x.shape[1] % 8 == 0
    assert initial_states.shape == (*x.shape[:2], width - 1) and initial_states.stride(1) == 1
    assert initial_states.dtype == x.dtype and weight.dtype == bias.dtype
    window = torch.cat([initial_states, x], 2).float()
    return F.silu(F.conv1d(window, weight[:, None], bias, groups=len(weight))).to(x.dtype)


def module(name: str, **contents: object) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(contents)
    return made


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Both are there, complete."""
    for name, contents in {
        "mamba_ssm": {"selective_scan_fn": selective_scan_fn},
        "selective_scan_cuda": {},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
        "causal_conv1d_cuda": {},
    }.items():
        monkeypatch.setitem(sys.modules, name, module(name, **contents))
    fused.choose_scan.cache_clear()
    fused.choose_convolution.cache_clear()
    yield
    fused.choose_scan.cache_clear()
    fused.choose_convolution.cache_clear()


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("tokens, fresh", [(1, False), (33, False), (33, True)])
def test_a_state_is_carried_into_a_scan_that_takes_none(tokens, fresh, kind):
    torch.manual_seed(0)
    dtype, d_inner, d_state = getattr(torch, kind), 96, 16
    projected = torch.randn(tokens, 8 + 2 * d_state)
    inputs = (
        torch.randn(tokens, d_inner).to(dtype),
        torch.randn(tokens, d_inner),
        -torch.arange(1.0, d_state + 1).repeat(d_inner, 1),
        projected[:, 8 : 8 + d_state],
        projected[:, 8 + d_state :],
        torch.randn(d_inner),
        torch.randn(tokens, 2 * d_inner).to(dtype)[:, d_inner:],
        torch.randn(d_inner) - 4,
    )
    h = torch.zeros(d_inner, d_state) if fresh else 100 * torch.randn(d_inner, d_state)
    moved, reference_moved = h.clone(), h.clone()
    out, reference = guarded(tokens, d_inner, dtype=dtype), torch.empty(tokens, d_inner, dtype=dtype)
    fused.scan_with_mamba_ssm(*inputs, moved, out.tensor, fresh=fresh)
    scan_many_reference(*inputs, reference_moved, reference)
    assert_close(out.checked(), reference.numpy(), "scan", kind)
    assert_close(moved.numpy(), reference_moved.numpy(), "scan")


def test_the_state_arrives_to_the_bit():
    h = torch.randn(96, 16) * 10 ** torch.empty(96, 16).uniform_(-20, 20)
    carried, none = h.clone(), torch.zeros(1, 96)
    still = (none, none - 200, -1000 * torch.rand(96, 16), torch.zeros(1, 16), torch.zeros(1, 16), torch.ones(96), none)
    fused.scan_with_mamba_ssm(*still, torch.zeros(96), carried, torch.empty(1, 96))  # Δ = softplus(-200) = 0: nothing moves
    assert torch.equal(carried, h)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_a_convolution_with_what_was_before(tokens, kind):
    torch.manual_seed(0)
    dtype = getattr(torch, kind)
    x, weight, bias = torch.randn(tokens, 192).to(dtype)[:, :96], torch.randn(96, 4), torch.randn(96)
    state = torch.randn(96, 4)
    moved, reference_moved = state.clone(), state.clone()
    out, reference = guarded(tokens, 96, dtype=dtype), torch.empty(tokens, 96, dtype=dtype)
    fused.convolve_with_causal_conv1d(x, moved, weight, bias, out.tensor)
    convolve_many_reference(x, reference_moved, weight, bias, reference)
    assert_close(out.checked(), reference.numpy(), "convolution", kind)
    assert torch.equal(moved, reference_moved)


def test_they_are_taken_where_they_are_complete(caplog):
    with caplog.at_level(logging.INFO):
        assert fused.choose_scan(GPU) == ("mamba-ssm", fused.scan_with_mamba_ssm)
        assert fused.choose_convolution(GPU, 96, 4) == ("causal-conv1d", fused.convolve_with_causal_conv1d)
    assert caplog.messages == ["scan: mamba-ssm", "convolution: causal-conv1d"]


def test_the_choice_and_its_reason_are_told_once(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "selective_scan_cuda")
    with caplog.at_level(logging.INFO):
        assert fused.choose_scan(GPU) == fused.choose_scan(GPU) == ("triton", scan_many)
    (told,) = caplog.messages
    assert told.startswith("scan: triton (mamba-ssm: mamba-ssm imports without its CUDA scan")


def test_on_a_processor_ours_run():
    assert fused.choose_scan(torch.device("cpu")).run is scan_many
    assert fused.choose_convolution(torch.device("cpu"), 96, 4).run is convolve_many


def test_what_is_not_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "mamba_ssm")
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    assert fused_kernels.why_no_mamba_ssm() == fused_kernels.why_no_causal_conv1d(96, 4) == "not installed"


def test_what_cannot_be_imported(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(fused_kernels.importlib, "import_module", broken)
    assert fused_kernels.why_no_mamba_ssm() == "mamba_ssm cannot be imported (undefined symbol: _ZN3c10)"


def test_other_versions(monkeypatch):
    monkeypatch.setattr(sys.modules["mamba_ssm"], "selective_scan_fn", lambda u, delta, A, B, C, D, z: None)
    assert "takes no delta_softplus, return_last_state; another version" in fused_kernels.why_no_mamba_ssm()
    monkeypatch.delattr(sys.modules["causal_conv1d"], "causal_conv1d_fn")
    assert fused_kernels.why_no_causal_conv1d(96, 4) == "causal_conv1d has no causal_conv1d_fn; another version of it is needed"


@pytest.mark.parametrize("d_inner, d_conv", [(100, 4), (96, 5)])
def test_shapes_that_causal_conv1d_does_not_take(d_inner, d_conv):
    assert fused.choose_convolution(GPU, d_inner, d_conv).name == "triton"
    assert f"{d_inner} channels with {d_conv} taps" in fused_kernels.why_no_causal_conv1d(d_inner, d_conv)
