"""mamba-ssm and causal-conv1d behind the model's contracts: stand-ins of what they promise, each reason not to take them."""

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.model import fused_kernels
from cobra_edge.model.mamba import REFERENCE, Mamba, MambaState, causal_conv, selective_scan

from ..tolerance import assert_close

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
    assert initial_states.dtype == x.dtype and weight.dtype == bias.dtype and weight.is_contiguous()
    window = torch.cat([initial_states, x], 2).float()
    return F.silu(F.conv1d(window, weight[:, None].float(), bias.float(), groups=len(weight))).to(x.dtype)


PARTS = {
    "mamba_ssm": {"selective_scan_fn": selective_scan_fn},
    "selective_scan_cuda": {},
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    "causal_conv1d_cuda": {},
}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Both are there, complete."""
    for name, contents in PARTS.items():
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
    fused_kernels.fused_operations.cache_clear()
    yield
    fused_kernels.fused_operations.cache_clear()


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_state_is_carried_into_a_scan_that_takes_none(tokens, dtype):
    torch.manual_seed(0)
    batch, d_inner, d_state = 2, 96, 16
    inputs = (
        torch.randn(batch, tokens, d_inner).to(dtype),
        torch.randn(batch, tokens, d_inner).to(dtype),
        -torch.arange(1.0, d_state + 1).repeat(d_inner, 1),
        torch.randn(batch, tokens, d_state).to(dtype),
        torch.randn(batch, tokens, d_state).to(dtype),
        torch.randn(d_inner),
        torch.randn(batch, tokens, 2 * d_inner).to(dtype)[..., d_inner:],
        torch.randn(d_inner) - 4,
    )
    h = 100 * torch.randn(batch, d_inner, d_state)
    before = h.clone()
    (out, after), (expected, last) = fused_kernels.selective_scan(*inputs, h), selective_scan(*inputs, h)
    assert_close(out.numpy(), expected.numpy(), "scan")
    assert_close(after.numpy(), last.numpy(), "scan")
    assert torch.equal(h, before) and out.dtype == torch.float32


def test_the_state_arrives_to_the_bit():
    h = torch.randn(1, 96, 16) * 10 ** torch.empty(1, 96, 16).uniform_(-20, 20)
    none, row = torch.zeros(1, 1, 96), torch.zeros(1, 1, 16)
    still = (none, none - 200, -1000 * torch.rand(96, 16), row, row, torch.ones(96), none, torch.zeros(96))
    _, after = fused_kernels.selective_scan(*still, h)  # Δ = softplus(-200) = 0: nothing moves
    assert torch.equal(after, h)


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_a_convolution_with_what_was_before(tokens, kind):
    torch.manual_seed(0)
    dtype = getattr(torch, kind)
    x = torch.randn(2, tokens, 192).to(dtype)[..., :96]
    weight, bias, state = torch.randn(96, 4).to(dtype), torch.randn(96).to(dtype), torch.randn(2, 96, 4)
    got, expected = (conv(x, state, weight, bias) for conv in (fused_kernels.causal_conv, causal_conv))
    assert got.dtype == dtype
    assert_close(got.float().numpy(), expected.float().numpy(), "scan" if kind == "float16" else "convolution", kind)


def test_a_whole_model_answers_the_same():
    config = MambaConfig(d_model=32, n_layer=2, vocab=40, d_inner=64, d_state=16, d_conv=4, dt_rank=2)
    torch.manual_seed(0)
    plain = Mamba(config).eval()
    fused = Mamba(config, fused_kernels.fused_operations(GPU, 64, 4)).eval()
    fused.load_state_dict(plain.state_dict())
    states = [MambaState.zeros(config, 1) for _ in range(2)]
    rows = torch.randn(1, 20, 32)
    with torch.inference_mode():
        for part in (rows[:, :7], rows[:, 7:]):
            (got, states[0]), (expected, states[1]) = fused(part, states[0]), plain(part, states[1])
            assert_close(got.numpy(), expected.numpy(), "decoder")


def test_they_are_taken_where_they_are_complete(caplog):
    with caplog.at_level(logging.INFO):
        found = fused_kernels.fused_operations(GPU, 96, 4)
    assert (found.conv, found.scan) == (fused_kernels.causal_conv, fused_kernels.selective_scan)
    assert caplog.messages == ["mamba-ssm's scan: used", "causal-conv1d: used"]


@pytest.mark.parametrize("part, name", [("selective_scan_cuda", "mamba-ssm's scan"), ("causal_conv1d_cuda", "causal-conv1d")])
def test_without_a_cuda_part_the_reference_runs_and_says_so_once(monkeypatch, caplog, part, name):
    monkeypatch.delitem(sys.modules, part)
    with caplog.at_level(logging.INFO):
        found = fused_kernels.fused_operations(GPU, 96, 4)
        assert fused_kernels.fused_operations(GPU, 96, 4) is found
    assert (found.scan is REFERENCE.scan) == (name == "mamba-ssm's scan") and (found.conv is REFERENCE.conv) != (
        found.scan is REFERENCE.scan
    )
    (told,) = [m for m in caplog.messages if "not used" in m]
    assert told.startswith(f"{name}: not used (") and f"the extension {part} is missing" in told


def test_on_a_processor_the_reference_runs():
    assert fused_kernels.fused_operations(torch.device("cpu"), 96, 4) == REFERENCE


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
    assert fused_kernels.fused_operations(GPU, d_inner, d_conv).conv is REFERENCE.conv
    assert f"{d_inner} channels with {d_conv} taps" in fused_kernels.why_no_causal_conv1d(d_inner, d_conv)
