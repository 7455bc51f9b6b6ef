"""Decoder backends against the torch reference and against themselves."""

import numpy as np
import pytest
import torch

from cobra_edge import run
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode import numpy_reference as reference
from cobra_edge.decode.backends import BACKENDS, open_decoder
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.decoder import DecoderOptions, DecoderState, Weights
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.errors import BundleError, InputError, MachineError
from cobra_edge.formats.model_config import decoder_shapes
from cobra_edge.formats.recipe import quantized_scheme, uniform_recipe
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.model.mamba import causal_conv, selective_scan
from cobra_edge.quantize.rtn import round_to_nearest
from cobra_edge.terminal.output import run_command

from ..conftest import TINY_MAMBA
from ..emulated.driver import plugged_in
from ..handmade import INT_SCHEMES
from ..tolerance import assert_close


@pytest.fixture(scope="module")
def opened(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize("length", [1, 63, 129])
def test_numpy_operations_equal_the_torch_ones(length):
    rng = np.random.default_rng(length)
    x, z, dt = rng.standard_normal((3, length, 24)).astype(np.float32)
    state, weight = rng.standard_normal((2, 24, 4)).astype(np.float32)
    bias, D, dt_bias = rng.standard_normal((3, 24)).astype(np.float32)
    carried = state.copy()
    u = reference.causal_conv(x, carried, weight, bias)
    expected = causal_conv(*(torch.from_numpy(a) for a in (x[None], state[None], weight, bias)))
    assert_close(u, expected[0].numpy(), "scan")
    assert np.array_equal(carried, np.concatenate([state.T, x])[-4:].T)

    A = -np.exp(rng.standard_normal((24, 16))).astype(np.float32)
    B, C = rng.standard_normal((2, length, 16)).astype(np.float32)
    h = rng.standard_normal((24, 16)).astype(np.float32)
    args = (torch.from_numpy(a) for a in (u[None], dt[None], A, B[None], C[None], D, z[None], dt_bias, h[None].copy()))
    expected, last = selective_scan(*args)
    y = reference.selective_scan(u, reference.softplus(dt + dt_bias), A, B, C, h)
    assert_close((y + D * u) * reference.silu(z), expected[0].numpy(), "scan")
    assert_close(h, last[0].numpy(), "scan")


def test_a_clip_bounds_the_scale_of_its_group():
    x = np.array([[1, -4, 0.02, 0.5], [1, -0.1, 8, 0.06]], np.float32)
    got = reference.round_activations(x, 2, np.array([2, 0.5], np.float32))
    step = np.float32([[2, 0.5], [1, 0.5]]) / 127  # of the first row's groups, of the second's
    expected = [[64, -127, 5, 127], [127, -13, 127, 15]] * np.repeat(step, 2, axis=1)
    assert_close(got, expected, "decoder")


def test_a_scan_longer_than_a_chunk_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    u, dt = rng.standard_normal((2, 50, 8)).astype(np.float32)
    A = -np.ones((8, 16), np.float32)
    B, C = rng.standard_normal((2, 50, 16)).astype(np.float32)
    h1, h2 = np.zeros((2, 8, 16), np.float32)
    whole = reference.selective_scan(u, np.abs(dt), A, B, C, h1)
    monkeypatch.setattr(reference, "_SCAN_CHUNK_BYTES", A.nbytes * 7)
    assert np.array_equal(whole, reference.selective_scan(u, np.abs(dt), A, B, C, h2))
    assert np.array_equal(h1, h2)


@pytest.mark.parametrize("scheme", INT_SCHEMES)
def test_numpy_equals_torch_on_cobra_mini(mini_bundle, scheme):
    bundle = Bundle.open(mini_bundle(scheme))
    ours, truth = NumpyDecoder(bundle, DecoderOptions(activations="float32")), TorchDecoder(bundle)
    embeddings = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    tokens = [2, 5, 300, 77, 9]
    a, b = ours.new_state(), truth.new_state()
    assert_close(ours.prefill(embeddings, a), truth.prefill(embeddings, b), "decoder")
    assert_close(ours.forward(ours.embed(tokens), a), truth.forward(truth.embed(tokens), b), "decoder")
    assert_close(ours.step(42, a), truth.step(42, b), "decoder")
    assert_close(a.ssm, b.ssm, "decoder")
    assert_close(a.conv, b.conv, "decoder")
    assert a.n_tokens == b.n_tokens == 70


class CodesKept(TorchDecoder):
    """Does on a CPU what it does on a GPU, where codes stay integers."""

    def _multiplies_codes(self, value):
        return value.scheme.code_format == "int"


@pytest.mark.parametrize("scheme", INT_SCHEMES)
def test_torch_over_codes_is_torch_over_dequantized_weights(mini_bundle, scheme):
    bundle = Bundle.open(mini_bundle(scheme))
    codes, dense = CodesKept(bundle), TorchDecoder(bundle)
    a, b = codes.new_state(), dense.new_state()
    rows = dense.embed([2, 5, 300, 77, 9])
    assert np.array_equal(codes.embed([2, 5, 300, 77, 9]), rows)
    assert_close(codes.forward(rows, a), dense.forward(rows, b), "decoder")
    assert_close(a.ssm, b.ssm, "decoder")
    kept = [name for name, module in codes.model.named_modules() if "forward" in vars(module)]
    assert len(kept) == (0 if scheme == "fp16" else 3 * codes.config.n_layer + 2)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.device == "cpu"], ids=lambda b: b.name)
@pytest.mark.parametrize("length", [1, 63, 129])
def test_prefill_then_steps_equals_forward(opened, backend, length):
    decoder = backend.open(opened, DecoderOptions(activations="float32"))
    tokens = np.random.default_rng(length).integers(0, TINY_MAMBA.vocab, length + 4).tolist()
    whole = decoder.forward(decoder.embed(tokens), decoder.new_state())
    state = decoder.new_state()
    rows = [decoder.prefill(decoder.embed(tokens[:length]), state)]
    rows += [decoder.step(t, state) for t in tokens[length:]]
    assert_close(np.stack(rows), whole[length - 1 :], "decoder")
    assert state.n_tokens == length + 4


def test_weights_kept_or_not_give_the_same_bits(opened, monkeypatch):
    tokens = [1, 2, 3]
    kept = NumpyDecoder(opened)
    monkeypatch.setattr(reference, "_KEEP_BYTES", 0)
    fresh = NumpyDecoder(opened)
    a, b = kept.new_state(), fresh.new_state()
    assert np.array_equal(kept.prefill(kept.embed(tokens), a), fresh.prefill(fresh.embed(tokens), b))
    assert not fresh._dense.keys() - {n for n in fresh._tensors if n.endswith("A_log")}


def test_state_survives_a_file(opened, tmp_path):
    decoder = NumpyDecoder(opened)
    state = decoder.new_state()
    decoder.prefill(decoder.embed([4, 5, 6]), state)
    state.save(tmp_path / "s.safetensors")
    loaded = DecoderState.load(tmp_path / "s.safetensors", decoder.config)
    assert loaded.n_tokens == 3
    assert np.array_equal(decoder.step(7, loaded), decoder.step(7, state))


def test_a_state_of_another_model_is_refused(opened, tmp_path):
    state = DecoderState(np.zeros((1, 2, 4), np.float32), np.zeros((1, 2, 16), np.float32))
    state.save(tmp_path / "s.safetensors")
    with pytest.raises(BundleError, match="expected"):
        DecoderState.load(tmp_path / "s.safetensors", TINY_MAMBA)
    bad = DecoderState.zeros(TINY_MAMBA)
    bad.ssm[0, 0, 0] = np.nan
    bad.save(tmp_path / "n.safetensors")
    with pytest.raises(InputError, match="NaN"):
        DecoderState.load(tmp_path / "n.safetensors", TINY_MAMBA)
    (tmp_path / "t.safetensors").write_bytes(b"short")
    with pytest.raises(BundleError, match="not a complete"):
        DecoderState.load(tmp_path / "t.safetensors", TINY_MAMBA)


def test_backends_explain_themselves(opened, monkeypatch):
    assert open_decoder(opened, "cpu", "numpy").name == "numpy"
    assert open_decoder(opened, "cpu", "torch").name == "torch"
    with pytest.raises(MachineError, match="on 'cuda'") as refused:
        open_decoder(opened, "cuda")
    assert all((f"{b.name} on {b.device}: " in str(refused.value)) == (b.device == "cuda") for b in BACKENDS)
    with pytest.raises(MachineError, match=r"\(native on cpu: cuda was requested\)"):
        open_decoder(opened, "cuda", "native")
    with pytest.raises(InputError, match="did you mean 'numpy'"):
        open_decoder(opened, "cpu", "nunpy")
    with pytest.raises(InputError, match="unknown device"):
        open_decoder(opened, "tpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="torch is not installed"):
        open_decoder(opened, "cpu", "torch")


def test_kernels_that_were_removed_name_those_to_take(opened, tiny_bundle, capsys):
    with pytest.raises(InputError, match="the decoder kernels 'triton' were removed; take 'cuda'"):
        open_decoder(opened, "auto", "triton")
    assert run_command(run.command, [str(tiny_bundle), "--prompt", "Why?", "--decoder-kernels", "triton"]) == 2
    assert "take 'cuda'" in capsys.readouterr().err
    assert run_command(run.command, [str(tiny_bundle), "--prompt", "Why?", "--decoder-kernels", "numpi"]) == 2
    assert "unknown decoder kernels 'numpi'; did you mean 'numpy'?" in " ".join(capsys.readouterr().err.split())


def test_narrow_eight_bit_rows_are_the_same_on_every_decoder(tmp_path):
    """A dt_proj of 8 inputs has no whole block of codes: kernels get it as float, the file keeps its codes."""
    config, rng = TINY_MAMBA, np.random.default_rng(0)
    recipe, _ = uniform_recipe(config, SCHEMES["w4a16-g128"], "guided")
    tensors = {}
    for name, shape in decoder_shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.1
        scheme = quantized_scheme(recipe, name)
        tensors[name] = values if scheme is None else round_to_nearest(values, scheme)
    assert tensors["backbone.layers.0.mixer.dt_proj.weight"].codes.shape == (256, 8)
    weights = Weights(config, recipe, tensors, "weights in memory")
    embeddings = rng.standard_normal((5, 128)).astype(np.float32)
    with plugged_in(tmp_path):
        decoders = [NumpyDecoder(weights), CpuDecoder(weights, DecoderOptions(1)), CudaDecoder(weights)]
        found = [d.prefill(embeddings, d.new_state()) for d in decoders]
    assert_close(found[1], found[0], "decoder")
    assert_close(found[2], found[0], "decoder", "int16")
