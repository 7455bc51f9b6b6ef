"""bitsandbytes' formats: the same bytes and values as the library's, and a decoder that runs the stored codes."""

import importlib.util

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.bitsandbytes_backend import MATMULS, BitsAndBytesDecoder
from cobra_edge.errors import BundleError, InputError, MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats import bitsandbytes_codes
from cobra_edge.formats.bitsandbytes_codes import load_bitsandbytes, quantize_bitsandbytes
from cobra_edge.formats.packing import NF4_LEVELS, QuantizedTensor
from cobra_edge.formats.recipe import Recipe, stored_tensors
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize.decoder_file import write_decoder

from ..conftest import TINY_MAMBA, write_text_only
from ..tolerance import assert_close

NF4, INT8 = SCHEMES["bnb-nf4"], SCHEMES["bnb-int8"]
IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
# {scheme: row of the tolerance table for the decoder}: int8 quantizes activations, nf4 does not
KIND = {"bnb-nf4": "float32", "bnb-int8": "bnb-int8"}


@pytest.fixture(scope="module")
def bnb():
    return load_bitsandbytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a text-only checkpoint and, by scheme and rotation, its bundle."""
    root = tmp_path_factory.mktemp("bnb")
    source = write_text_only(root / "mamba-tiny")
    made = {}

    def get(scheme, rotation="none"):
        if (scheme, rotation) not in made:
            out = root / f"{scheme}-{rotation}"
            options = {"scheme": scheme, "method": "rtn", "rotation": rotation, "golden_lines": 16}
            made[scheme, rotation] = export_bundle(str(source), target_named("cpu"), out, **options).directory
        return Bundle.open(made[scheme, rotation])

    get.source = source
    return get


def matrix(out, n_in=256, seed=0):
    """Return a matrix with a block of zeros, a row of zeros if there are enough rows, and one outlier."""
    weight = np.random.default_rng(seed).standard_normal((out, n_in)).astype(np.float32)
    weight[0, 64:128] = 0
    weight[-1, 70] = -9
    if out > 2:
        weight[1] = 0
    return weight


def test_the_levels_are_those_of_bitsandbytes(bnb):
    assert np.array_equal(np.float32(NF4_LEVELS), bnb.functional.get_4bit_type("nf4", device="cpu").numpy())


@pytest.mark.parametrize("out", [1, 63, 129])
def test_nf4_is_as_documented(out):
    weight = matrix(out)
    quantized = quantize_bitsandbytes(weight, NF4)
    assert (quantized.codes.dtype, quantized.codes.shape) == (np.uint8, (out, 128))
    assert np.array_equal(quantized.scales, np.abs(weight).reshape(out, 4, 64).max(axis=2))
    values, levels = quantized.dequantize(), np.float32(NF4_LEVELS)
    for i in (0, out // 2, out - 1):
        for j in range(0, 256, 3):
            byte, scale = int(quantized.codes[i, j // 2]), quantized.scales[i, j // 64]
            code = byte & 15 if j % 2 else byte >> 4
            assert values[i, j] == levels[code] * scale
            nearest = np.abs(levels * scale - weight[i, j]).min()
            assert abs(values[i, j] - weight[i, j]) <= nearest + 1e-6 * scale


@pytest.mark.parametrize("out", [1, 63, 129])
def test_int8_rows_are_as_documented(out):
    weight = matrix(out)
    quantized = quantize_bitsandbytes(weight, INT8)
    assert (quantized.codes.dtype, quantized.codes.shape) == (np.int8, (out, 256))
    half = weight.astype(np.float16).astype(np.float32)
    top = np.abs(half).max(axis=1, keepdims=True)
    assert np.array_equal(quantized.scales, top)
    exact = half * np.divide(127, top, out=np.zeros_like(top), where=top > 0)
    assert (np.abs(quantized.codes - exact) <= 0.5001).all()
    assert_close(quantized.dequantize(), quantized.codes.astype(np.float64) * top / 127, "product")


@pytest.mark.parametrize("out", [1, 63, 129])
def test_values_equal_what_bitsandbytes_makes_of_its_codes(bnb, out):
    weight = matrix(out)
    codes, state = bnb.functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    ours = quantize_bitsandbytes(weight, NF4)
    assert np.array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1))
    assert np.array_equal(ours.dequantize(), bnb.functional.dequantize_4bit(codes, state).numpy())
    rows, tops, _ = bnb.functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    ours = quantize_bitsandbytes(weight, INT8)
    loud = tops.numpy() > 0  # elsewhere bitsandbytes divides by zero
    assert np.array_equal(ours.codes[loud], rows.numpy()[loud])
    assert np.array_equal(ours.dequantize()[loud], bnb.functional.int8_vectorwise_dequant(rows, tops).numpy()[loud])
    assert not ours.dequantize()[~loud].any()


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
def test_rows_taken_together_or_not_give_the_same_codes(monkeypatch, scheme):
    whole = quantize_bitsandbytes(matrix(63), scheme)
    monkeypatch.setattr(bitsandbytes_codes, "_WEIGHTS_AT_ONCE", 256 * 5)
    parts = quantize_bitsandbytes(matrix(63), scheme)
    assert np.array_equal(whole.codes, parts.codes) and np.array_equal(whole.scales, parts.scales)
    some = np.array([3, 3, 0])
    assert np.array_equal(whole.rows(some).dequantize(), whole.dequantize()[some])


@pytest.mark.parametrize("shape", [(256,), (1, 256), (7, 256), (1, 63, 256)])
def test_matmuls_equal_their_naive_references(bnb, shape):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    weight = quantize_bitsandbytes(matrix(63), NF4)
    got = MATMULS["nf4"](bnb, weight, torch.device("cpu"))(torch.from_numpy(x)).numpy()
    assert_close(got, x @ weight.dequantize().T, "product")

    weight = quantize_bitsandbytes(matrix(63), INT8)
    half = x.astype(np.float16).astype(np.float32)
    top = np.abs(half).max(axis=-1, keepdims=True)
    codes = np.rint(half * (127 / top)).astype(np.int64)
    naive = (codes @ weight.codes.astype(np.int64).T) * (top / 127) * (weight.scales[:, 0] / 127)
    got = MATMULS["int8-rows"](bnb, weight, torch.device("cpu"))(torch.from_numpy(x)).numpy()
    assert got.dtype == np.float32
    assert_close(got, naive, "product", "int8-rows")


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
def test_cobra_mini_exported_and_run(mini_bundle, scheme):
    bundle = Bundle.open(mini_bundle(scheme.name))
    assert bundle.manifest.drift.runtime == "bitsandbytes"
    ours, truth, plain = (open_decoder(bundle, "cpu", kernels) for kernels in ("bitsandbytes", "torch", "numpy"))
    embeddings = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    tokens = [2, 5, 300, 77, 9]
    assert np.array_equal(ours.embed(tokens), plain.embed(tokens))
    a, b, c = (decoder.new_state() for decoder in (ours, truth, plain))
    got = ours.forward(embeddings, a)
    assert_close(got, truth.forward(embeddings, b), "decoder", KIND[scheme.name])
    assert_close(got, plain.forward(embeddings, c), "decoder", KIND[scheme.name])
    assert_close(a.ssm, b.ssm, "decoder", KIND[scheme.name])
    stored = load_file(bundle.path(DECODER))
    codes, scales = stored[f"{IN_PROJ}.codes"], stored[f"{IN_PROJ}.scales"]
    expected = quantize_bitsandbytes(open_checkpoint("mini").decoder[IN_PROJ].float().numpy(), scheme)
    assert np.array_equal(codes, expected.codes) and np.array_equal(scales, expected.scales)
    assert stored["backbone.layers.0.mixer.dt_proj.weight"].dtype == np.float16


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
@pytest.mark.parametrize("length", [1, 63, 129])
def test_prefill_then_steps_equals_forward(tiny, scheme, length):
    decoder = open_decoder(tiny(scheme.name), "cpu", "bitsandbytes")
    tokens = np.random.default_rng(length).integers(0, TINY_MAMBA.vocab, length + 4).tolist()
    whole = decoder.forward(decoder.embed(tokens), decoder.new_state())
    state = decoder.new_state()
    rows = [decoder.prefill(decoder.embed(tokens[:length]), state)]
    rows += [decoder.step(t, state) for t in tokens[length:]]
    assert_close(np.stack(rows), whole[length - 1 :], "decoder")
    assert state.n_tokens == length + 4


@pytest.mark.parametrize("rotation", ["out-proj", "both"])
def test_rotations_are_the_torch_references(tiny, rotation):
    bundle = tiny("bnb-nf4", rotation)
    ours, truth = open_decoder(bundle, "cpu", "bitsandbytes"), open_decoder(bundle, "cpu", "torch")
    tokens = list(range(20))
    assert_close(
        ours.forward(ours.embed(tokens), ours.new_state()), truth.forward(truth.embed(tokens), truth.new_state()), "decoder"
    )


def test_codes_are_not_made_anew(tiny, monkeypatch, bnb):
    bundle = tiny("bnb-nf4")
    for name in ("quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant"):
        monkeypatch.setattr(bnb.functional, name, None)
    decoder = open_decoder(bundle, "cpu", "bitsandbytes")
    assert np.isfinite(decoder.step(1, decoder.new_state())).all()
    assert "weight" not in dict(decoder.model.lm_head.named_parameters())


def test_a_recipe_of_several_schemes(tiny, tmp_path):
    whole = tiny("bnb-nf4")
    tensors = whole.manifest.recipe.tensors | {
        "backbone.layers.*.mixer.in_proj.weight": "bnb-int8",
        IN_PROJ: "w4a16-g128",
        "backbone.layers.*.mixer.x_proj.weight": "float16",
        "backbone.embedding.weight": "w8a16-g128",
    }
    recipe = Recipe("mixed", "rtn", tensors)
    write_decoder(open_checkpoint(str(tiny.source)), recipe, tmp_path / DECODER, lambda: None)
    bundle = Bundle(tmp_path, msgspec.structs.replace(whole.manifest, recipe=recipe))
    formats = {n: v.scheme.code_format for n, v in bundle.decoder_tensors().items() if isinstance(v, QuantizedTensor)}
    assert set(formats.values()) == {"int", "nf4", "int8-rows"}
    ours, truth = open_decoder(bundle, "cpu", "bitsandbytes"), open_decoder(bundle, "cpu", "torch")
    tokens = list(range(20))
    got, expected = (d.forward(d.embed(tokens), d.new_state()) for d in (ours, truth))
    assert_close(got, expected, "decoder", "bnb-int8")
    assert not np.array_equal(got, expected), "no activation was rounded: bitsandbytes ran nothing"


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="group size 64 does not divide in_features 96"):
        quantize_bitsandbytes(np.zeros((2, 96), np.float32), NF4)
    with pytest.raises(InputError, match="do not divide in_features 48"):
        quantize_bitsandbytes(np.zeros((2, 48), np.float32), INT8)


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(scheme, bad):
    weight = matrix(4)
    weight[2, 5] = bad
    with pytest.raises(InputError, match="not finite or too large"):
        quantize_bitsandbytes(weight, scheme)


def test_a_weight_too_large_for_float16_is_refused():
    weight = matrix(4)
    weight[2, 5] = 1e5
    assert np.isfinite(quantize_bitsandbytes(weight, NF4).dequantize()).all()
    with pytest.raises(InputError, match="too large for bnb-int8"):
        quantize_bitsandbytes(weight, INT8)


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
def test_other_dtypes_and_shapes_are_refused(scheme):
    good = quantize_bitsandbytes(matrix(4), scheme)
    for codes, scales in [
        (good.codes, good.scales.astype(np.float16)),
        (good.codes.view(np.uint8 if scheme is INT8 else np.int8), good.scales),
        (good.codes, good.scales[:, 1:]),
        (good.codes[:, :-1], good.scales),
    ]:
        with pytest.raises(InputError, match="quantized tensor"):
            QuantizedTensor(codes, scales, scheme)


@pytest.mark.parametrize("scheme", [NF4, INT8], ids=lambda s: s.name)
@pytest.mark.parametrize(("part", "dtype"), [("codes", np.int16), ("scales", np.float16)])
def test_other_dtypes_in_the_file_are_refused(tiny, tmp_path, scheme, part, dtype):
    bundle = tiny(scheme.name)
    stored = load_file(bundle.path(DECODER))
    stored[f"{IN_PROJ}.{part}"] = stored[f"{IN_PROJ}.{part}"].astype(dtype)
    save_file(stored, tmp_path / DECODER)
    with pytest.raises(BundleError, match=rf"in_proj\.weight\.{part} is"):
        Bundle(tmp_path, bundle.manifest).decoder_tensors()


def test_what_is_stored_is_planned(tiny):
    for scheme in (NF4, INT8):
        plan = stored_tensors(TINY_MAMBA, tiny(scheme.name).manifest.recipe)[IN_PROJ]
        assert [(t.dtype, t.shape) for t in plan] == (
            [("uint8", (512, 64)), ("float32", (512, 2))] if scheme is NF4 else [("int8", (512, 128)), ("float32", (512, 1))]
        )


def test_the_backend_says_why_not(tiny, tiny_bundle, tmp_path, monkeypatch):
    with pytest.raises(MachineError, match="bitsandbytes on cpu: the recipe has no tensors in bitsandbytes' formats"):
        open_decoder(Bundle.open(tiny_bundle), "cpu", "bitsandbytes")
    bundle = tiny("bnb-int8")
    assert isinstance(open_decoder(bundle), BitsAndBytesDecoder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(MachineError, match=r"bitsandbytes is not installed \(pip install '\.\[bnb\]'\)"):
        open_decoder(bundle, "cpu", "bitsandbytes")
    with pytest.raises(MachineError, match=r"\.\[bnb\]"):
        export_bundle(str(tiny.source), target_named("cpu"), tmp_path / "b", scheme="bnb-nf4")
    assert not any(tmp_path.iterdir())
    assert open_decoder(bundle).name == "numpy"
