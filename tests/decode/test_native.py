"""The native CPU decoder: every kernel against its numpy reference, the decoder against the references, and its refusals."""

import shutil

import msgspec
import numpy as np
import pytest

import cobra_edge
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode import numpy_reference as reference
from cobra_edge.decode.backends import BACKENDS, open_decoder
from cobra_edge.decode.cpu import CpuDecoder, arrays_of
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.decode.native import kernels
from cobra_edge.decode.native.decoder import CompiledDecoder
from cobra_edge.decode.native.library import kernel_names
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.environment.threads import physical_cores
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.hadamard import hadamard_factors, hadamard_matrix, rotate
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.packing import QuantizedTensor
from cobra_edge.formats.recipe import ROTATIONS
from cobra_edge.formats.scheme import Scheme
from cobra_edge.formats.targets import target_named
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.quantize.rtn import round_to_nearest

from ..conftest import MINI, write_text_only
from ..handmade import INT_SCHEMES, magnitudes, mixed_recipe, write_bundle
from ..tolerance import TOLERANCES, assert_close, distance

KERNELS = kernel_names()
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def quantized(rng, out, n_in, bits, group):
    scheme = Scheme(f"w{bits}a16-g{group}", bits, group)
    return round_to_nearest(rng.standard_normal((out, n_in)).astype(np.float32), scheme)


def test_there_is_always_the_plain_path():
    assert KERNELS[-1] == "scalar" and len(set(KERNELS)) == len(KERNELS)
    with pytest.raises(ValueError, match="no kernels named 'avx9'; available: .*scalar"):
        kernels.exponential(np.zeros(1, np.float32), "avx9")


@pytest.mark.parametrize("name", KERNELS)
def test_the_exponential_keeps_its_stated_error(name):
    x = np.concatenate([np.linspace(-87, 88, 100_003), np.linspace(-1e-3, 1e-3, 101)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(kernels.exponential(x, name) / exact - 1).max() < 2e-7
    far = kernels.exponential(np.array([-1e30, -200, 200, 1e30], np.float32), name)
    assert (far[:2] < 1e-37).all() and (far[2:] > 1e38).all() and np.isfinite(far).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", [1, 63, 129, 256])
def test_norm(name, width):
    x, weight = np.random.default_rng(width).standard_normal((2, width)).astype(np.float32)
    assert_close(kernels.rms_norm(x, weight, 1e-5, name), reference.rms_norm(x, weight, 1e-5), "decoder")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 20, 63, 129])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 32), (4, 64), (4, 128), (4, 256), (3, 64), (3, 128), (3, 256), (8, 32), (8, 128), (8, 256), (8, 512)],
)
def test_product_with_quantized_weights(name, tokens, bits, group):
    rng = np.random.default_rng(bits * group + tokens)
    for out in (1, 5, 34):
        w = quantized(rng, out, 512, bits, group)
        x = rng.standard_normal((tokens, 512)).astype(np.float32)
        x[:, ::97] *= 20  # outliers, as trained activations have
        dense = w.dequantize()
        assert_close(kernels.multiply(w.codes, w.scales, x, False, None, name), x @ dense.T, "decoder")
        onto = rng.standard_normal((tokens, out)).astype(np.float32)
        expected = reference.round_activations(x, group) @ dense.T
        assert_close(kernels.multiply(w.codes, w.scales, x, True, None, name), expected, "decoder")
        assert_close(kernels.multiply(w.codes, w.scales, x, True, onto, name), expected + onto, "decoder")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", [32, 96, 160, 2560, 5120])
def test_one_group_for_a_whole_row(name, width):
    """A row may be any multiple of a block: less than a register, one, or many; GEMV and GEMM give the same bits."""
    rng = np.random.default_rng(width)
    w = quantized(rng, 21, width, 8, width)
    x = rng.standard_normal((9, width)).astype(np.float32)
    for int8, inputs in ((False, x), (True, reference.round_activations(x, width))):
        many = kernels.multiply(w.codes, w.scales, x, int8, None, name)
        assert_close(many, inputs @ w.dequantize().T, "decoder")
        for few in (1, 3):
            assert_bits(kernels.multiply(w.codes, w.scales, x[:few], int8, None, name), many[:few], name, int8)


def assert_bits(got, expected, name, int8):
    """Compare bits; plain C++ sums float32 matmuls in the order its compiler chose, for one token as for many."""
    assert np.array_equal(got, expected), (name, int8, np.abs(got - expected).max())


@pytest.mark.parametrize("name", KERNELS)
def test_many_groups_and_extreme_codes(name):
    """More groups than are widened together, every code and activation at its extreme: no sum may overflow."""
    for bits, group, n_groups in (
        (3, 64, 72),
        (4, 32, 72),
        (4, 128, 72),
        (4, 512, 72),
        (8, 32, 72),
        (8, 128, 72),
        (8, 44128, 1),
    ):
        n_in = n_groups * group
        for code in (0, 255):
            codes = np.full((3, n_in * bits // 8), code, np.uint8)
            scales = np.full((3, n_groups), 0.5, np.float16)
            for value in (-1.0, 1.0):
                x = np.full((5, n_in), value, np.float32)
                weight = ((code & (2**bits - 1)) - 2 ** (bits - 1)) * 0.5
                got = kernels.multiply(codes, scales, x, True, None, name)
                assert_close(got, np.full((5, 3), weight * value * n_in, np.float32), "decoder")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 32), (4, 128), (8, 128), (8, 512)])
def test_clipped_activations(name, bits, group):
    rng = np.random.default_rng(group)
    w = quantized(rng, 13, 512, bits, group)
    clips = rng.uniform(0.5, 4, 512 // group).astype(np.float32)  # some reached, some not
    for tokens in (1, 3, 20):
        x = rng.standard_normal((tokens, 512)).astype(np.float32)
        x[:, ::97] *= 20
        expected = reference.round_activations(x, group, clips) @ w.dequantize().T
        got = kernels.multiply(w.codes, w.scales, x, True, None, name, clips)
        assert_close(got, expected, "decoder")
        free = kernels.multiply(w.codes, w.scales, x, True, None, name)
        assert not np.allclose(got, free, rtol=1e-2)
        far = np.full_like(clips, 1e30)
        assert np.array_equal(kernels.multiply(w.codes, w.scales, x, True, None, name, far), free)
        assert np.array_equal(
            kernels.multiply(w.codes, w.scales, x, False, None, name, clips),
            kernels.multiply(w.codes, w.scales, x, False, None, name),
        )


# Infinities and NaN with several bit patterns, some of whose low bits look like an exponent.
NOT_FINITE = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FC001FF, 0xFFC00080, 0x7FFFFFFF], np.uint32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("clipped", [False, True])
def test_what_is_not_finite_survives_rounding(name, clipped):
    """Quantized activations are integers and cannot hold NaN: still, the results of its token are NaN, and no others."""
    w = quantized(np.random.default_rng(0), 13, 256, 8, 128)
    clips = np.full(2, 1.5, np.float32) if clipped else None
    for column, odd in enumerate(NOT_FINITE.view(np.float32), 60):
        for tokens in (1, 3, 20):
            x = np.random.default_rng(1).standard_normal((tokens, 256)).astype(np.float32)
            x[-1, column] = odd
            for got in (
                kernels.multiply(w.codes, w.scales, x, True, None, name, clips),
                reference.round_activations(x, 128, clips) @ w.dequantize().T,
            ):
                assert np.isnan(got[-1]).all() and np.isfinite(got[:-1]).all()


@pytest.mark.parametrize("name", KERNELS)
def test_nan_survives_the_exponential(name):
    nan = NOT_FINITE[2:].view(np.float32)
    assert np.isnan(kernels.exponential(nan, name)).all()
    x, ones = np.zeros((5, 37), np.float32), np.ones((37, 4), np.float32)
    x[:, [3, 36]] = nan[:, None]
    u = kernels.conv_silu(x, ones.copy(), ones.T.copy(), ones[:, 0].copy(), name)
    assert np.isnan(u[:, [3, 36]]).all() and np.isfinite(np.delete(u, [3, 36], axis=1)).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("clips", [None, np.full(2, 1e-42, np.float32)])
def test_groups_too_quiet_to_be_divided_by_are_zeros(name, clips):
    w = quantized(np.random.default_rng(0), 5, 128, 4, 64)
    x = np.full((3, 128), 1e-40 if clips is None else 1.0, np.float32)
    assert not kernels.multiply(w.codes, w.scales, x, True, None, name, clips).any()
    assert not reference.round_activations(x, 64, clips).any()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_product_with_float_weights(name, dtype):
    rng = np.random.default_rng(0)
    for n_in in (1, 16, 63, 129, 160):
        w = rng.standard_normal((7, n_in)).astype(dtype)
        x = rng.standard_normal((3, n_in)).astype(np.float32)
        got = kernels.multiply(w, None, x, False, None, name)
        assert_close(got, x @ w.astype(np.float32).T, "decoder")


@pytest.mark.parametrize("name", KERNELS)
def test_every_float16_is_read_exactly(name):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    got = kernels.dequantize(every, None, 256, name)
    assert np.array_equal(got, every.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dequantize_is_exact(name, bits):
    w = quantized(np.random.default_rng(1), 9, 256, bits, 64)
    assert np.array_equal(kernels.dequantize(w.codes, w.scales, 256, name), w.dequantize())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width", [1, 2, 64, 12, 1536, 5120])
def test_rotation(name, width):
    x = np.random.default_rng(width).standard_normal((3, width)).astype(np.float32)
    matrix = hadamard_matrix(hadamard_factors(width)[0])
    assert_close(kernels.rotate(x, matrix, name), rotate(x), "decoder")


@pytest.mark.parametrize("name", KERNELS)
def test_peak_macs_are_measured(name):
    assert 1e6 < kernels.peak_macs(name, 1) < 1e14


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("taps", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 3, 63, 129])
def test_convolution_with_carried_state(name, taps, tokens):
    rng = np.random.default_rng(tokens)
    for channels in (1, 16, 37):
        x = rng.standard_normal((tokens, channels)).astype(np.float32)
        state, weight = rng.standard_normal((2, channels, taps)).astype(np.float32)
        bias = rng.standard_normal(channels).astype(np.float32)
        ours = state.copy()
        got = kernels.conv_silu(x, ours, np.ascontiguousarray(weight.T), bias, name)
        assert_close(got, reference.causal_conv(x, state, weight, bias), "scan")
        assert np.array_equal(ours, state)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d_state", [1, 16, 17])
@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_scan_with_carried_state(name, d_state, tokens):
    rng = np.random.default_rng(tokens)
    for channels in (1, 16, 37):
        u, dt, z = (4 * rng.standard_normal((3, tokens, channels))).astype(np.float32)
        A = -np.exp(rng.standard_normal((channels, d_state))).astype(np.float32)
        B, C = rng.standard_normal((2, tokens, d_state)).astype(np.float32)
        D, bias = rng.standard_normal((2, channels)).astype(np.float32)
        h = rng.standard_normal((channels, d_state)).astype(np.float32)
        ours = h.copy()
        got = kernels.selective_scan(u, dt, A, B, C, D, z, bias, ours, name)
        y = reference.selective_scan(u, reference.softplus(dt + bias), A, B, C, h)
        assert_close(got, (y + D * u) * reference.silu(z), "scan")
        assert_close(ours, h, "scan")


@pytest.mark.parametrize("scheme", INT_SCHEMES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_decoder_equals_its_reference_on_cobra_mini(mini_bundle, scheme, name):
    """Compared with torch if activations stay float32, with numpy, which rounds the same way, if they do not.

    The latter on an image, not on noise: a value near a rounding boundary may change a code by one, which a trained model
    ignores for a real image and may amplify for noise.
    """
    bundle = Bundle.open(mini_bundle(scheme))
    session = cobra_edge.load(bundle)
    seen, tokens = (
        session.visual_embeddings(MINI / "demo.png"),
        session.codec.encode(session.template.first_turn("Is there a red circle?")),
    )
    noise = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for kind, embeddings, truth in (
        ("float32", noise, TorchDecoder(bundle)),
        ("float32", seen, TorchDecoder(bundle)),
        ("int8", seen, NumpyDecoder(bundle, DecoderOptions(activations="int8"))),
    ):
        ours = CpuDecoder(bundle, DecoderOptions(activations=kind), name)
        a, b = ours.new_state(), truth.new_state()
        assert_close(ours.prefill(embeddings, a), truth.prefill(embeddings, b), "decoder", kind)
        expected = truth.forward(truth.embed(tokens), b)
        assert_close(ours.forward(ours.embed(tokens), a), expected, "decoder", kind)
        answer = int(expected[-1].argmax())
        assert_close(ours.step(answer, a), truth.step(answer, b), "decoder", kind)
        assert_close(a.ssm, b.ssm, "decoder", kind)
        assert_close(a.conv, b.conv, "decoder", kind)
        assert a.n_tokens == b.n_tokens == 64 + len(tokens) + 1


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Every matrix in another scheme, both rotations, clips: an untied head, and a dt_proj with one group per row."""
    root = tmp_path_factory.mktemp("mixed")
    config = MambaConfig(384, 3, 512, 768, 16, 4, 160, tied=False)
    source = str(write_text_only(root / "mamba-mixed", config=config))
    plain = Bundle.open(
        export_bundle(source, target_named("cpu"), root / "plain", scheme="fp16", method="rtn", golden_lines=16).directory
    )
    recipe = mixed_recipe(config, rotations=ROTATIONS["both"], activations="int8", activation_percentile=99.9)
    stored = {recipe.storage(name) for name in decoder_shapes(config)} - {"float16", "float32"}
    assert stored == set(INT_SCHEMES) - {"fp16"}
    free, checkpoint = msgspec.structs.replace(recipe, activation_percentile=None), open_checkpoint(source)
    bundle = write_bundle(plain, checkpoint, free, root / "free")
    reader = NumpyDecoder(bundle)
    return write_bundle(plain, checkpoint, recipe, root / "clipped", magnitudes(bundle, reader.embed(list(range(100)))))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("activations", ["float32", "int8", None])
def test_a_mixed_recipe_runs(mixed, name, activations):
    """Short lines: a value near a rounding boundary changes what follows by percents; most lines have none."""
    options = DecoderOptions(2, activations)
    ours, truth = CpuDecoder(mixed, options, name), NumpyDecoder(mixed, options)
    found, expected = [], []
    for tokens in np.random.default_rng(0).integers(0, 512, (15, 2)).tolist():
        for decoder, kept in ((ours, found), (truth, expected)):
            state = decoder.new_state()
            kept.append((decoder.forward(decoder.embed(tokens), state), state.ssm))
        assert_close(ours.embed(tokens), truth.embed(tokens), "decoder")
    whole = [tuple(np.stack(part) for part in zip(*lines, strict=True)) for lines in (found, expected)]
    for got, right in zip(*whole, strict=True):
        assert_close(got, right, "decoder", activations or "int8")
    alike = [
        distance(got[0], right[0])[0] < TOLERANCES["decoder", "float32"][0] for got, right in zip(found, expected, strict=True)
    ]
    assert sum(alike) > len(alike) / 2


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_cuts_and_threads_do_not_change_a_bit_of_a_mixed_recipe(mixed, name, activations):
    """Some groups are quantized by the threads that own their channels, others by token."""
    embeddings = np.random.default_rng(1).standard_normal((140, 384)).astype(np.float32)
    found = []
    for threads, cut in ((1, 140), (2, 1), (3, 63), (5, 129)):
        decoder = CpuDecoder(mixed, DecoderOptions(threads, activations), name)
        state = decoder.new_state()
        parts = [decoder.forward(part, state) for part in np.split(embeddings, [cut]) if len(part)]
        found.append((np.concatenate(parts), state.ssm, state.conv))
    for other in found[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_the_recipe_says_which_activations_unless_one_is_given(mixed):
    tokens = [1, 2, 3]
    for decoder_of in (NumpyDecoder, CpuDecoder):
        found = {}
        for activations in (None, "int8", "float32"):
            decoder = decoder_of(mixed, DecoderOptions(activations=activations))
            found[activations] = decoder.prefill(decoder.embed(tokens), decoder.new_state())
        assert np.array_equal(found[None], found["int8"]) and not np.array_equal(found[None], found["float32"])


def test_codes_of_other_formats_are_refused(tiny):
    recipe = msgspec.structs.replace(tiny.manifest.recipe, tensors={"backbone.layers.0.mixer.in_proj.weight": "bnb-nf4"})
    bundle = Bundle(tiny.directory, msgspec.structs.replace(tiny.manifest, recipe=recipe))
    native = next(b for b in BACKENDS if b.name == "native")
    assert native.refuses(tiny) is None
    assert native.refuses(bundle) == "codes in bitsandbytes' format nf4 need the backend bitsandbytes"


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
def test_prefill_then_steps_is_forward_to_the_bit(tiny, activations, length):
    """Tiles differ between one token and many, and chunks have a fixed length: neither may affect the result."""
    decoder = CpuDecoder(tiny, DecoderOptions(activations=activations))
    tokens = np.random.default_rng(length).integers(0, 512, length + 3).tolist()
    whole = decoder.forward(decoder.embed(tokens), decoder.new_state())
    state = decoder.new_state()
    rows = [decoder.prefill(decoder.embed(tokens[:length]), state)]
    rows += [decoder.step(t, state) for t in tokens[length:]]
    assert np.array_equal(np.stack(rows), whole[length - 1 :])


def test_the_number_of_threads_does_not_change_a_bit(tiny):
    tokens = np.random.default_rng(3).integers(0, 512, 70).tolist()
    answers = []
    for threads in (1, 2, 3, 5):
        decoder = CpuDecoder(tiny, DecoderOptions(threads=threads, activations="int8"))
        state = decoder.new_state()
        answers.append((decoder.forward(decoder.embed(tokens), state), state.ssm, state.conv))
    for other in answers[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(answers[0], other, strict=True))


def test_two_python_threads_may_share_a_decoder(tiny):
    from concurrent.futures import ThreadPoolExecutor

    decoder = CpuDecoder(tiny, DecoderOptions(threads=2, activations="int8"))
    tokens = [1, 2, 3, 4, 5]
    alone = decoder.forward(decoder.embed(tokens), decoder.new_state())
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(lambda: decoder.forward(decoder.embed(tokens), decoder.new_state())) for _ in range(32)]
    assert all(np.array_equal(run.result(), alone) for run in runs)


def test_weights_are_mapped_not_copied(tiny):
    codes = tiny.decoder_tensors()["backbone.layers.0.mixer.in_proj.weight"]
    assert isinstance(codes, QuantizedTensor)
    assert not codes.codes.flags.owndata and not codes.codes.flags.writeable


def test_more_threads_than_cores_is_warned(tiny, caplog):
    with caplog.at_level("WARNING"):
        CpuDecoder(tiny, DecoderOptions(threads=physical_cores() + 1))
    assert "will wait for each other" in caplog.text
    with pytest.raises(InputError, match="threads is 0"):
        DecoderOptions(threads=0)
    with pytest.raises(InputError, match="did you mean 'int8'"):
        DecoderOptions(activations="int")


def test_auto_takes_the_native_decoder(tiny):
    assert open_decoder(tiny).name == "native"


def arguments_of(bundle):
    return msgspec.structs.asdict(bundle.manifest.model.mamba), arrays_of(bundle.decoder_tensors())


IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, t: t.pop(f"{IN_PROJ}.codes"), "is missing"),
        (lambda s, t: t.pop("backbone.norm_f.weight"), "is missing"),
        (lambda s, t: t.update({f"{IN_PROJ}.codes": t[f"{IN_PROJ}.codes"][:-1].copy()}), "scales do not fit"),
        (lambda s, t: t.update({f"{IN_PROJ}.codes": t[f"{IN_PROJ}.codes"][:, :-1].copy()}), "hold neither 8-, 4- nor 3-bit"),
        (lambda s, t: t.update({f"{IN_PROJ}.scales": t[f"{IN_PROJ}.scales"].astype(np.float32)}), "float16 scales"),
        (lambda s, t: t.update({f"{IN_PROJ}.codes": t[f"{IN_PROJ}.codes"].view(np.int8)}), "uint8 codes"),
        (lambda s, t: t.update({"backbone.norm_f.weight": np.zeros(3, np.float32)}), "norm_f has 3 values"),
        (lambda s, t: t.update({"backbone.norm_f.weight": np.zeros(128, np.float64)}), "not float32"),
        (lambda s, t: t.update({f"{IN_PROJ}.clips": np.ones(2, np.float32)}), "clips are not 1 of float32, one per group"),
        (lambda s, t: t.update({f"{IN_PROJ}.clips": np.ones(1)}), "clips are not 1 of float32"),
        (lambda s, t: t.update({"residual_rotation": np.ones((3, 3), np.float32)}), "no rotation of 128 channels"),
        (lambda s, t: t.update({"rotation": np.ones((3, 3), np.float32)}), "no rotation of 256 channels"),
        (lambda s, t: s.update(d_state=15), r"x_proj is|A_log has"),
        (lambda s, t: s.update(d_inner=128), "hold neither 8-, 4- nor 3-bit"),
        (lambda s, t: s.update(vocab=513), "the config asks for"),
        (lambda s, t: s.update(d_conv=9), "d_conv is 9"),
        (lambda s, t: s.update(n_layer=3), "is missing"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, change, says):
    sizes, arrays = arguments_of(tiny)
    change(sizes, arrays)
    with pytest.raises(ValueError, match=says):
        CompiledDecoder(sizes, arrays, "auto", 1, True)


def test_unaligned_weights_are_refused(tiny):
    sizes, arrays = arguments_of(tiny)
    raw = np.zeros(128 * 4 + 1, np.uint8)[1:].view(np.float32)
    with pytest.raises(ValueError, match="not aligned"):
        CompiledDecoder(sizes, arrays | {"backbone.norm_f.weight": raw}, "auto", 1, True)


def test_calls_that_do_not_fit_are_refused_by_the_compiled_part_too(tiny):
    """In addition to the checks of `decode.arguments`: no call reads or writes outside its arguments."""
    sizes, arrays = arguments_of(tiny)
    decoder, state = CompiledDecoder(sizes, arrays, "auto", 1, True), DecoderState.zeros(tiny.manifest.model.mamba)
    for token in (512, -1):
        with pytest.raises(IndexError, match=f"token {token} is outside the vocabulary of 512"):
            decoder.embed(np.array([token]))
    with pytest.raises(ValueError, match="embeddings must be"):
        decoder.forward(np.zeros((2, 3), np.float32), state.conv, state.ssm, False)
    with pytest.raises(ValueError, match="at least one position"):
        decoder.forward(np.zeros((0, 128), np.float32), state.conv, state.ssm, False)
    with pytest.raises(ValueError, match="ssm is not of this model's shape"):
        decoder.forward(np.zeros((1, 128), np.float32), state.conv, state.ssm[:, :, :8].copy(), False)


def test_a_mapped_file_that_was_cut_is_refused(tiny_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    bundle = Bundle.open(copy)
    data = (copy / "decoder.safetensors").read_bytes()
    (copy / "decoder.safetensors").write_bytes(data[:-1000])
    with pytest.raises(InputError, match="not a complete safetensors file"):
        CpuDecoder(bundle, DecoderOptions())


def test_numpy_and_native_say_the_same(mini_bundle):
    bundle = Bundle.open(mini_bundle("w8a16-g128"))
    exact, ours = NumpyDecoder(bundle), CpuDecoder(bundle, DecoderOptions(activations="float32"))
    a, b = exact.new_state(), ours.new_state()
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    logits, mine = exact.prefill(x, a), ours.prefill(x, b)
    for _ in range(12):
        token = int(np.argmax(logits))
        assert token == int(np.argmax(mine))
        logits, mine = exact.step(token, a), ours.step(token, b)


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("1,2", 1), ("", None), ("0", None), ("many", None), ("9999", None)])
def test_a_process_takes_as_many_threads_as_it_is_told(tiny, monkeypatch, caplog, asked, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    with caplog.at_level("INFO"):
        CpuDecoder(tiny, DecoderOptions())
    assert f", {threads or physical_cores()} threads, " in caplog.text
    with caplog.at_level("INFO"):
        CpuDecoder(tiny, DecoderOptions(threads=physical_cores()))
    assert f", {physical_cores()} threads, " in caplog.text.splitlines()[-1]
