"""The CUDA decoder, its shipped host code on the real cuda-bindings: over a fake driver that runs the kernels' own sources."""

import ctypes
import functools
import gc
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import DECODER, Bundle
from cobra_edge.decode.cuda import decoder as cuda
from cobra_edge.decode.cuda import device
from cobra_edge.decode.cuda import weights as cuda_weights
from cobra_edge.decode.cuda.calls import call
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.sampling import GREEDY, Sampling
from cobra_edge.errors import InputError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.generate import generate
from cobra_edge.inference.session import Session

from ..conftest import write_text_only
from ..tolerance import assert_close
from .weights import random_weights

# No width is a power of two, dt_rank is no multiple of 16.
CONFIG = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=True)
# Every form of codes; where a recipe would round activations, a GPU keeps them finer.
OURS = [s for s, scheme in SCHEMES.items() if scheme.code_format == "int" and scheme.activation_bits is None]
TOKENS = np.random.default_rng(0).integers(0, 512, 70).tolist()
each = pytest.mark.parametrize(
    ("scheme", "rotation"),
    [
        *((s, "none") for s in OURS),
        ("fp16", "both"),
        ("w4a16-g128", "both"),
        ("w3a16-g64", "residual"),
        ("w8a16-channel", "out-proj"),
    ],
)


@pytest.fixture(scope="module", autouse=True)
def plugged_in(gpu_of_a_module):
    return gpu_of_a_module


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Return a text-only bundle, in w8a16-g128; its drift is measured on the emulated GPU."""
    root = tmp_path_factory.mktemp("cuda")
    source = str(write_text_only(root / "mamba-tiny", config=CONFIG))
    given = {"scheme": "w8a16-g128", "rotation": "none", "method": "rtn", "golden_lines": 2}
    found = export_bundle(source, target_named("cpu"), root / "b", budget=budget_without_limits(root), **given)
    return Bundle.open(found.directory)


@functools.cache
def made(scheme, rotation="none"):
    """Return weights of a scheme and a rotation."""
    return random_weights(CONFIG, scheme, rotation)


@pytest.fixture(scope="module")
def opened():
    """Return the decoder of a scheme and a rotation, opened when it is first asked for."""
    return functools.cache(lambda scheme, rotation="none": CudaDecoder(made(scheme, rotation)))


@each
def test_it_is_the_numpy_decoder(opened, scheme, rotation):
    """Reading many tokens rounds what enters a product to float16, reading one to 16-bit integers."""
    ours, truth = opened(scheme, rotation), NumpyDecoder(made(scheme, rotation), DecoderOptions(activations="float32"))
    a, b = ours.new_state(), truth.new_state()
    tokens = TOKENS[:13]
    embeddings = truth.embed(tokens)
    assert_close(ours.embed(tokens), embeddings, "decoder")
    assert_close(ours.forward(embeddings[:9], a), truth.forward(embeddings[:9], b), "decoder", "float16 products")
    assert_close(ours.prefill(embeddings[9:], a), truth.prefill(embeddings[9:], b), "decoder", "float16 products")
    assert_close(a.ssm, b.ssm, "decoder", "float16 products")
    assert_close(a.conv, b.conv, "decoder", "float16 products")
    assert a.n_tokens == b.n_tokens == 13


@each
def test_a_step_rounds_to_16_bit_integers(opened, scheme, rotation):
    ours, truth = opened(scheme, rotation), NumpyDecoder(made(scheme, rotation), DecoderOptions(activations="float32"))
    a, b = ours.new_state(), truth.new_state()
    for token in TOKENS[:2]:
        assert_close(ours.step(token, a), truth.step(token, b), "decoder", "float32" if scheme == "fp16" else "int16")
    assert_close(a.ssm, b.ssm, "decoder", "float32" if scheme == "fp16" else "int16")
    assert_close(a.conv, b.conv, "decoder", "float32" if scheme == "fp16" else "int16")


@pytest.mark.parametrize("length", [1, 17])
def test_prefill_then_steps_equals_forward(opened, length):
    decoder = opened("w4a16-g128", "both")
    tokens = TOKENS[: length + 3]
    whole = decoder.forward(decoder.embed(tokens), decoder.new_state())
    state = decoder.new_state()
    rows = [decoder.prefill(decoder.embed(tokens[:length]), state)]
    rows += [decoder.step(t, state) for t in tokens[length:]]
    assert_close(np.stack(rows), whole[length - 1 :], "decoder", "float16 products")
    assert state.n_tokens == length + 3


def test_a_prompt_longer_than_a_chunk_is_the_same(opened, monkeypatch):
    decoder = opened("w4a16-g128")
    embeddings, a, b = decoder.embed(TOKENS[:20]), decoder.new_state(), decoder.new_state()
    whole, last = decoder.forward(embeddings, a), decoder.prefill(embeddings, decoder.new_state())
    monkeypatch.setattr(cuda, "CHUNK", 8)
    monkeypatch.setattr(cuda, "LOGITS_CHUNK", 3)
    assert_close(decoder.forward(embeddings, b), whole, "decoder", "float16 products")
    assert_close(b.ssm, a.ssm, "decoder", "float16 products")
    assert_close(decoder.prefill(embeddings, decoder.new_state()), last, "decoder", "float16 products")


def test_states_take_turns(opened):
    """Launches find a state by its address: what one session does is nothing to another."""
    decoder = opened("w4a16-g128")
    alone = []
    for tokens in (TOKENS[:2], TOKENS[5:7]):
        state = decoder.new_state()
        alone.append([decoder.step(t, state) for t in tokens])
    a, b = decoder.new_state(), decoder.new_state()
    for i in range(2):
        assert np.array_equal(decoder.step(TOKENS[i], a), alone[0][i])
        assert np.array_equal(decoder.step(TOKENS[5 + i], b), alone[1][i])


def test_a_snapshot_goes_to_the_host_and_back(opened, tmp_path):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    decoder.prefill(decoder.embed(TOKENS[:9]), state)
    assert isinstance(state, GpuState)
    snapshot, copied = state.host(), state.copy()
    assert type(snapshot) is DecoderState and isinstance(copied, GpuState) and snapshot.n_tokens == 9
    state.save(tmp_path / "s.safetensors")
    loaded = DecoderState.load(tmp_path / "s.safetensors", CONFIG)
    expected = decoder.step(7, state)
    assert not np.array_equal(state.ssm, snapshot.ssm)  # the snapshot stayed where it was
    for other in (snapshot, loaded, copied, decoder.new_state(like=snapshot), decoder.new_state(like=copied)):
        other.require(CONFIG)
        assert np.array_equal(decoder.step(7, other), expected)
        assert np.array_equal(other.ssm, state.ssm) and np.array_equal(other.conv, state.conv)
        assert other.n_tokens == 10
    processor = NumpyDecoder(made("w4a16-g128"))
    moved = processor.new_state(like=state)
    assert type(moved) is DecoderState
    assert_close(processor.step(3, moved), decoder.step(3, state), "decoder", "int16")


def test_a_copy_is_independent(opened):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    decoder.step(1, state)
    before, ssm = state.copy(), state.ssm
    decoder.step(2, state)
    assert np.array_equal(before.ssm, ssm) and before.n_tokens == 1


def test_a_state_of_another_model_is_refused(opened):
    with pytest.raises(InputError, match="the state belongs to another model"):
        opened("w4a16-g128").new_state().require(MambaConfig(128, 2, 512, 256, 16, 4, 8))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 20, 0.9, 3), Sampling(2.0, 0, 1.0, 4)], ids=str)
def test_tokens_chosen_on_the_gpu_are_those_chosen_on_the_host(opened, sampling):
    decoder = opened("w8a16-g128")
    host = SimpleNamespace(step=decoder.step)  # has no generation of its own
    found = []
    for runs in (decoder, host):
        state = decoder.new_state()
        logits = decoder.prefill(decoder.embed(TOKENS[:6]), state)
        found.append((list(generate(runs, logits, state, -1, 4, sampling)), state.n_tokens, state.ssm))
    (tokens, n_tokens, ssm), expected = found
    assert tokens == expected[0] and n_tokens == expected[1] == 6 + 3
    assert np.array_equal(ssm, expected[2])
    if sampling.temperature:
        assert len(set(tokens)) > 1


def test_generation_ends_at_the_end_token_and_lets_others_in_between(opened):
    decoder = opened("w8a16-g128")

    def begun():
        state = decoder.new_state()
        return decoder.prefill(decoder.embed(TOKENS[:6]), state), state

    logits, state = begun()
    whole = list(generate(decoder, logits, state, -1, 5, Sampling(3.0, seed=1)))
    end = next(t for i, t in enumerate(whole) if i and t not in whole[:i])
    logits, state = begun()
    assert list(generate(decoder, logits, state, end, 5, Sampling(3.0, seed=1))) == whole[: whole.index(end)]
    assert state.n_tokens == 6 + whole.index(end)  # the end token was not read
    logits, state = begun()
    disturbed, other = [], decoder.new_state()
    for token in generate(decoder, logits, state, -1, 5, Sampling(3.0, seed=1)):
        disturbed.append(token)
        decoder.step(9, other)
    assert disturbed == whole


def test_logits_that_are_not_finite_are_an_error(opened):
    decoder = opened("w8a16-g128")
    logits = np.zeros(512, np.float32)
    logits[5] = np.nan
    for sampling in (GREEDY, Sampling(1.0)):
        with pytest.raises(InputError, match="not finite"):
            next(generate(decoder, logits, decoder.new_state(), -1, 3, sampling))
    assert list(generate(decoder, np.zeros(512, np.float32), decoder.new_state(), -1, 1, GREEDY)) == [0]  # and it goes on


def test_a_session_answers_with_it(bundle):
    session = Session(bundle, "auto", "cuda")
    answer = session.ask(None, "Is it random?", max_new_tokens=3)
    answer.read()
    expected = Session.ask(session, None, "Is it random?", max_new_tokens=3)
    assert isinstance(answer.state, GpuState) and answer.tokens
    expected.read()
    assert answer.tokens == expected.tokens
    follow_up = session.ask(answer, "And now?", max_new_tokens=3)
    follow_up.read()
    assert follow_up.state.n_tokens > answer.state.n_tokens


def test_one_token_takes_few_launches(opened, plugged_in):
    decoder, state = opened("w4a16-g128"), opened("w4a16-g128").new_state()
    before = plugged_in.launches
    decoder.step(1, state)
    assert plugged_in.launches - before == 4 * CONFIG.n_layer + 2


def test_embeddings_that_lie_on_the_gpu_are_read_there(opened):
    decoder = opened("w4a16-g128", "both")
    embeddings, expected = decoder.embed(TOKENS[:6]), decoder.new_state()
    logits = decoder.prefill(embeddings, expected)
    assert decoder.embedding_room(9).shape == (9, 384)
    room, state = decoder.embedding_room(6), decoder.new_state()
    ctypes.memmove(room.address, embeddings.ctypes.data, embeddings.nbytes)
    assert np.array_equal(decoder.prefill(room, state), logits) and np.array_equal(state.ssm, expected.ssm)
    assert np.array_equal(decoder.forward(room, decoder.new_state())[-1:].shape, (1, 512))
    there = np.empty_like(embeddings)
    ctypes.memmove(there.ctypes.data, room.address, there.nbytes)
    assert np.array_equal(there, embeddings)  # read, not used up


def test_activations_stay_float_and_that_is_said(caplog):
    with caplog.at_level("INFO"):
        decoder = CudaDecoder(made("w4a8"))
    assert "activations stay 16 bits wide" in caplog.text and decoder.activations == "float32"
    assert decoder.runs_on == "cuda" and decoder.stream


def test_memory_is_given_back(plugged_in):
    def used():
        decoder = CudaDecoder(made("w4a16-g128"))
        state = decoder.new_state()
        decoder.prefill(decoder.embed([1, 2, 3]), state)
        decoder.step(3, state)

    used()
    before = plugged_in.in_use, plugged_in.handles
    used()
    assert (plugged_in.in_use, plugged_in.handles) == before


def test_what_was_read_leaves_the_page_cache(bundle, monkeypatch):
    """A Jetson's file cache is the GPU's memory: no more of the file than a slice stays in it while weights are copied."""
    file, calls, mapped = bundle.path(DECODER), [], []
    monkeypatch.setattr(cuda_weights, "_SLICE_BYTES", 50_000)

    def note(descriptor, begin, length, advice):
        assert os.fstat(descriptor).st_ino == file.stat().st_ino
        assert (begin, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # all of it
        found = re.findall(rf"{re.escape(str(file))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
        mapped.append(sum(map(int, found)))
        calls.append(length)

    monkeypatch.setattr(os, "posix_fadvise", note)
    CudaDecoder(bundle)
    assert len(calls) > file.stat().st_size // 100_000
    assert max(mapped) == 0  # a page that is mapped stays in the cache, whatever is advised


def test_a_closed_session_gives_its_memory_back(bundle, plugged_in):
    before = plugged_in.in_use
    session = Session(bundle, "auto", "cuda")
    session.ask(None, "Is it random?", max_new_tokens=1).read()
    assert plugged_in.in_use > before
    session.close()
    assert plugged_in.in_use == before
    with pytest.raises(InputError, match="closed"):
        session.ask(None, "Is it random?")


def test_the_same_bits_in_any_order_of_threads(opened, plugged_in):
    decoder, found = opened("w4a16-g64", "none"), []
    embeddings = decoder.embed(TOKENS[:20])
    for seed in (1, 2):
        plugged_in.seed(seed)
        state = decoder.new_state()
        found.append((decoder.prefill(embeddings, state), decoder.step(3, state), state.ssm, state.conv))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_two_decoders_on_one_gpu_take_turns():
    first, second = CudaDecoder(made("w4a16-g128")), CudaDecoder(made("w8a16-channel"))
    alone = [[d.step(t, s) for t in TOKENS[:3]] for d in (first, second) for s in [d.new_state()]]
    a, b = first.new_state(), second.new_state()
    for i in range(3):
        assert np.array_equal(first.step(TOKENS[i], a), alone[0][i]) and np.array_equal(second.step(TOKENS[i], b), alone[1][i])
    assert first.stream != second.stream
    assert np.array_equal(second.step(5, second.new_state(a)), second.step(5, a.copy()))  # of the other one


def test_two_decoders_in_two_threads():
    decoders = CudaDecoder(made("w4a16-g128")), CudaDecoder(made("w8a16-channel"))

    def answer(decoder):
        state = decoder.new_state()
        logits = decoder.prefill(decoder.embed(TOKENS[:5]), state)
        return list(decoder.generate(logits, state, -1, 4, Sampling(2.0, seed=1)))

    alone = [answer(d) for d in decoders]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, decoders)) == alone


def test_the_garbage_collector_may_come_at_any_call(monkeypatch):
    """And give an earlier decoder's stream back while the next one takes what it needs of the GPU."""
    monkeypatch.setattr(cuda.first_gpu(), "_functions", {})
    made_before = CudaDecoder(made("w4a16-g128"))
    made_before.itself = made_before
    del made_before

    def collecting(*arguments):
        gc.collect()
        return call(*arguments)

    monkeypatch.setattr(device, "call", collecting)
    looking = threading.Thread(target=lambda: cuda.first_gpu().function("conv_step_w8"), daemon=True)
    looking.start()
    looking.join(20)
    assert not looking.is_alive()


@pytest.mark.parametrize("config", [MambaConfig(84, 2, 512, 132, 5, 3, 7), MambaConfig(64, 1, 512, 96, 32, 2, 3)], ids=str)
def test_sizes_that_are_multiples_of_nothing(config):
    ours, truth = CudaDecoder(random_weights(config, "fp16")), NumpyDecoder(random_weights(config, "fp16"))
    a, b = ours.new_state(), truth.new_state()
    embeddings = truth.embed(TOKENS[:5])
    assert_close(ours.embed(TOKENS[:5]), embeddings, "decoder")
    assert_close(ours.forward(embeddings, a), truth.forward(embeddings, b), "decoder", "float16 products")
    assert_close(ours.step(3, a), truth.step(3, b), "decoder", "float16 products")
    assert a.n_tokens == b.n_tokens == 6
