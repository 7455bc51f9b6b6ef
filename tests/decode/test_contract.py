"""The contract of `decode.decoder.Decoder`: all backends accept and refuse the same tokens, embeddings and states."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import BACKENDS, open_decoder
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.targets import target_named

from ..conftest import TINY_MAMBA, write_text_only
from ..emulated.driver import plugged_in

# Names of `--decoder-kernels`; native twice, because quantized activations use other kernels.
DECODERS = ("native", "native-int8", "numpy", "numpy-int8", "torch", "bitsandbytes-nf4", "bitsandbytes-int8", "cuda")
N_STATE = TINY_MAMBA.n_layer, TINY_MAMBA.d_inner


def test_every_backend_is_held_to_the_contract():
    assert {name.partition("-")[0] for name in DECODERS} == {b.name for b in BACKENDS}


@pytest.fixture(scope="module")
def opened(tiny_bundle, tmp_path_factory):
    """Return the decoder with a name, opened on first use."""
    root, made = tmp_path_factory.mktemp("contract"), {}

    def of_bitsandbytes(scheme):
        source = root / "mamba-tiny"
        if not source.exists():
            write_text_only(source)
        return Bundle.open(
            export_bundle(str(source), target_named("cpu"), root / scheme, scheme=scheme, golden_lines=16).directory
        )

    def get(name):
        kind, _, form = name.partition("-")
        if name not in made and kind == "cuda":
            made[name] = CudaDecoder(Bundle.open(tiny_bundle))
        elif name not in made and kind == "bitsandbytes":
            made[name] = open_decoder(of_bitsandbytes(f"bnb-{form}"), "cpu", kind)
        elif name not in made:
            made[name] = open_decoder(Bundle.open(tiny_bundle), "cpu", kind, DecoderOptions(1, form or "float32"))
        return made[name]

    with plugged_in(root):
        yield get


@pytest.fixture(params=DECODERS)
def decoder(opened, request):
    return opened(request.param)


def predictions(decoder, embeddings):
    """Return the calls that read embeddings, each a function of a state."""
    return [lambda state: decoder.prefill(embeddings, state), lambda state: decoder.forward(embeddings, state)]


def assert_refused(decoder, reads, says):
    """Check that each raises our InputError and leaves the state unchanged."""
    random = np.random.default_rng(0)
    conv, ssm = (random.standard_normal((*N_STATE, width)).astype(np.float32) for width in (4, 16))
    for read in reads:
        state = decoder.new_state(DecoderState(conv, ssm, 1))
        with pytest.raises(InputError, match=says):
            read(state)
        assert state.n_tokens == 1 and np.array_equal(state.conv, conv) and np.array_equal(state.ssm, ssm)


@pytest.mark.parametrize("token", [-1, -512, 512, 2**31, 2**63, -(2**64)])
def test_a_token_outside_the_vocabulary(decoder, token):
    says = rf"token {token} is outside the vocabulary, expected 0 to 511"
    assert_refused(decoder, [lambda _: decoder.embed([3, token]), lambda state: decoder.step(token, state)], says)


@pytest.mark.parametrize("token", [1.0, "1", None, np.float32(2)], ids=repr)
def test_a_token_that_is_no_integer(decoder, token):
    assert_refused(decoder, [lambda _: decoder.embed([token]), lambda s: decoder.step(token, s)], "expected tokens as integers")


def test_the_first_and_last_token_of_any_integer_type(decoder):
    rows = decoder.embed([0, 511])
    assert rows.shape == (2, 128) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert np.array_equal(decoder.embed([np.int32(0), np.uint16(511)]), rows)
    assert decoder.step(np.int64(511), decoder.new_state()).shape == (512,)


def test_no_tokens_have_no_embeddings(decoder):
    rows = decoder.embed([])
    assert rows.shape == (0, 128) and rows.dtype == np.float32


def test_no_embeddings_have_no_logits(decoder):
    assert_refused(decoder, predictions(decoder, np.zeros((0, 128), np.float32)), "no embeddings")


@pytest.mark.parametrize("shape", [(2, 127), (2, 129), (128,), (1, 2, 128), (2, 0), ()])
def test_embeddings_of_another_shape(decoder, shape):
    assert_refused(decoder, predictions(decoder, np.zeros(shape, np.float32)), r"embeddings have shape .*expected \(seq, 128\)")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.complex64, object])
def test_embeddings_that_are_no_real_numbers(decoder, dtype):
    assert_refused(decoder, predictions(decoder, np.zeros((2, 128), dtype)), "expected float32")


def test_embeddings_of_other_floating_point_and_order(decoder):
    rows = decoder.embed([5, 6, 7])
    expected = decoder.prefill(rows, decoder.new_state())
    wide = np.repeat(rows, 2, axis=1)[:, ::2]
    for same in (rows.astype(np.float64), np.asfortranarray(rows), wide):
        assert np.array_equal(decoder.prefill(same, decoder.new_state()), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_carried_through(decoder, value):
    """Sampling then refuses the logits (`sampling.NOT_FINITE`): there is no answer from invalid logits."""
    rows, state = decoder.embed([5, 6, 7]), decoder.new_state()
    rows[1, 3] = value
    assert not np.isfinite(decoder.forward(rows, decoder.new_state())[1]).any()
    assert not np.isfinite(decoder.prefill(rows[:2], state)).any() and not np.isfinite(state.conv).all()


def other_states():
    """Yield states of another model, or that cannot be updated in place, with the expected message."""
    conv, ssm = (np.zeros((*N_STATE, width), np.float32) for width in (TINY_MAMBA.d_conv, TINY_MAMBA.d_state))
    frozen = ssm.copy()
    frozen.flags.writeable = False
    another = "to another model"
    yield "layers", DecoderState(conv[:1], ssm[:1]), another
    yield "width", DecoderState(conv[:, :128].copy(), ssm[:, :128].copy()), another
    yield "d_state", DecoderState(conv, ssm[..., :8].copy()), another
    yield "rank", DecoderState(conv[0], ssm[0]), another
    yield "dtype", DecoderState(conv.astype(np.float64), ssm), "conv is writable contiguous float64"
    yield "integers", DecoderState(conv, ssm.astype(np.int32)), "ssm is writable contiguous int32"
    yield "order", DecoderState(np.asfortranarray(conv), ssm), "conv is writable strided float32"
    yield "stride", DecoderState(conv, np.zeros((*N_STATE, 32), np.float32)[..., ::2]), "ssm is writable strided float32"
    yield "read-only", DecoderState(conv, frozen), "ssm is read-only contiguous float32"


@pytest.mark.parametrize(("state", "says"), [pytest.param(s, says, id=name) for name, s, says in other_states()])
def test_a_state_that_is_not_this_models(decoder, state, says):
    rows = decoder.embed([1, 2])
    for read in (*predictions(decoder, rows), lambda s: decoder.step(1, s)):
        with pytest.raises(InputError, match=says):
            read(state)
        assert state.n_tokens == 0
    if "another" in says:
        with pytest.raises(InputError, match=says):
            decoder.new_state(state)


def test_a_copy_of_a_state_can_be_written_into(decoder):
    """Whatever the memory layout of the original's arrays."""
    for _, state, says in other_states():
        if "another" not in says and state.shapes[1] == (*N_STATE, 16):
            assert decoder.step(1, decoder.new_state(state)).shape == (512,)


def test_a_state_of_another_backend_is_read_where_it_lies(decoder, opened):
    expected = decoder.new_state()
    logits = decoder.step(7, expected)
    for state in (DecoderState.zeros(TINY_MAMBA), opened("cuda").new_state()):
        assert np.array_equal(decoder.step(7, state), logits)
        assert state.n_tokens == 1
        assert np.array_equal(state.conv, expected.conv) and np.array_equal(state.ssm, expected.ssm)


def test_threads_share_a_decoder(decoder):
    """Each with a state of its own, as requests of a server do."""

    def read(first):
        state = decoder.new_state()
        found = [decoder.prefill(decoder.embed([first, 3, 5]), state)]
        return np.array([*found, *(decoder.step((7 * first + i) % 512, state) for i in range(5))])

    firsts = range(1, 9)
    alone = [read(n) for n in firsts]
    with ThreadPoolExecutor(4) as pool:
        assert np.array_equal(list(pool.map(read, firsts)), alone)


def test_asking_for_shapes_takes_no_memory(monkeypatch):
    """Every call checks its state, without allocating a new one, which would be large for a large model."""
    monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("made a state"))
    huge = MambaConfig(16384, 512, 512, 65536, 256, 8, 8)
    with pytest.raises(InputError, match="to another model"):
        DecoderState(np.empty((1, 2, 4), np.float32), np.empty((1, 2, 16), np.float32)).require_writable(huge)


def test_a_damaged_bundle_is_refused_by_every_backend(tiny_bundle, tmp_path):
    from ..bundle.test_hostile import damaged_norm

    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    damaged_norm(copy)
    for kernels in ("native", "numpy", "torch"):
        with pytest.raises(InputError, match=r"1 of 128 values of backbone\.layers\.1\.norm\.weight are NaN or infinite"):
            open_decoder(Bundle.open(copy), "cpu", kernels)
