"""The decoder on a GPU, run by Triton's interpreter: everything but the graph, the stream and the GPU's memory."""

import ctypes
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.cuda import decoder as cuda
from cobra_edge.decode.cuda import driver
from cobra_edge.decode.cuda.decoder import CudaDecoder, needed_bytes
from cobra_edge.decode.cuda.kernels.launch import recording
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.cuda.step import Step
from cobra_edge.decode.cuda.weights import hollow
from cobra_edge.decode.decoder import DecoderOptions, DecoderState, Weights
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.sampling import GREEDY, Sampling
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import uniform_recipe
from cobra_edge.formats.scheme import SCHEMES, scheme_named
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.generate import generate
from cobra_edge.inference.session import Session

from ...conftest import write_text_only
from ...tolerance import assert_close
from .gpu_case import few_programs

CPU = torch.device("cpu")
# No width is a power of two, dt_rank is no multiple of 16.
CONFIG = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=True)
# Every form of codes; where a recipe would round activations, a GPU does not.
OURS = [s for s, scheme in SCHEMES.items() if scheme.code_format == "int" and scheme.activation_bits is None]
TOKENS = np.random.default_rng(0).integers(0, 512, 70).tolist()
each = pytest.mark.parametrize(("scheme", "rotation"), [*((s, "none") for s in OURS), ("fp16", "both"), ("w4a16-g128", "both")])


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_programs():
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the bundle of a scheme and a rotation, exported when it is first asked for."""
    root = tmp_path_factory.mktemp("cuda")
    source = str(write_text_only(root / "mamba-tiny", config=CONFIG))

    @functools.cache
    def made(scheme, rotation):
        out = root / f"{scheme}-{rotation}"
        export_bundle(source, target_named("cpu"), out, scheme=scheme, rotation=rotation, golden_lines=2)
        return Bundle.open(out)

    return lambda scheme, rotation="none": made(scheme, rotation)


@pytest.fixture(scope="module")
def opened(exported):
    made = functools.cache(lambda scheme, rotation: CudaDecoder(exported(scheme, rotation), device=CPU))
    return lambda scheme, rotation="none": made(scheme, rotation)


@each
def test_it_is_the_torch_decoder(exported, opened, scheme, rotation):
    """Reading many tokens rounds what enters a product to float16, one token rounds nothing."""
    ours, truth = opened(scheme, rotation), TorchDecoder(exported(scheme, rotation))
    a, b = ours.new_state(), truth.new_state()
    tokens = TOKENS[:24]
    embeddings = truth.embed(tokens)
    assert_close(ours.embed(tokens), embeddings, "decoder")
    assert_close(ours.forward(embeddings[:17], a), truth.forward(embeddings[:17], b), "decoder", "float16 products")
    assert_close(ours.prefill(embeddings[17:], a), truth.prefill(embeddings[17:], b), "decoder", "float16 products")
    assert_close(a.ssm, b.ssm, "decoder", "float16 products")
    assert_close(a.conv, b.conv, "decoder", "float16 products")
    assert a.n_tokens == b.n_tokens == 24


@each
def test_a_step_is_float32(exported, opened, scheme, rotation):
    ours, truth = opened(scheme, rotation), NumpyDecoder(exported(scheme, rotation), DecoderOptions(activations="float32"))
    a, b = ours.new_state(), truth.new_state()
    for token in TOKENS[:2]:
        assert_close(ours.step(token, a), truth.step(token, b), "decoder")
    assert_close(a.ssm, b.ssm, "decoder")
    assert_close(a.conv, b.conv, "decoder")


@pytest.mark.parametrize("length", [1, 2, 17])
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
    embeddings, a, b = decoder.embed(TOKENS[:40]), decoder.new_state(), decoder.new_state()
    whole, last = decoder.forward(embeddings, a), decoder.prefill(embeddings, decoder.new_state())
    monkeypatch.setattr(cuda, "CHUNK", 16)
    monkeypatch.setattr(cuda, "_LOGITS_CHUNK", 5)
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


def test_a_snapshot_goes_to_the_host_and_back(exported, opened, tmp_path):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    decoder.prefill(decoder.embed(TOKENS[:9]), state)
    assert isinstance(state, GpuState)
    snapshot, reference = state.host(), state.copy()
    assert type(snapshot) is DecoderState and isinstance(reference, GpuState) and snapshot.n_tokens == 9
    state.save(tmp_path / "s.safetensors")
    loaded = DecoderState.load(tmp_path / "s.safetensors", CONFIG)
    expected = decoder.step(7, state)
    assert not np.array_equal(state.ssm, snapshot.ssm)  # the snapshot stayed where it was
    for other in (snapshot, loaded, reference, decoder.new_state(like=snapshot), decoder.new_state(like=reference)):
        other.require(CONFIG)
        assert np.array_equal(decoder.step(7, other), expected)
        assert np.array_equal(other.ssm, state.ssm) and np.array_equal(other.conv, state.conv)
        assert other.n_tokens == 10
    processor = NumpyDecoder(exported("w4a16-g128"))
    moved = processor.new_state(like=state)
    assert type(moved) is DecoderState
    assert_close(processor.step(3, moved), decoder.step(3, state), "decoder")


def test_a_copy_is_independent(opened):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    decoder.step(1, state)
    before, ssm = state.copy(), state.ssm
    decoder.step(2, state)
    assert np.array_equal(before.ssm, ssm) and before.n_tokens == 1


def test_a_state_of_another_model_is_refused(opened):
    with pytest.raises(InputError, match="state belongs to another model"):
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


def test_a_session_answers_with_it(exported, opened, monkeypatch):
    bundle = exported("w8a16-g128")
    monkeypatch.setattr("cobra_edge.inference.session.open_decoder", lambda *_: opened("w8a16-g128"))
    session = Session(bundle)
    answer = session.ask(None, "Is it random?", max_new_tokens=3)
    answer.read()
    expected = Session.ask(session, None, "Is it random?", max_new_tokens=3)
    assert isinstance(answer.state, GpuState) and answer.tokens
    expected.read()
    assert answer.tokens == expected.tokens
    follow_up = session.ask(answer, "And now?", max_new_tokens=3)
    follow_up.read()
    assert follow_up.state.n_tokens > answer.state.n_tokens


def test_one_token_takes_few_launches():
    """At full size, recorded on tensors without memory."""
    shape = MambaConfig(2560, 64, 50280, 5120, 16, 4, 160)
    recipe, _ = uniform_recipe(shape, scheme_named("w4a16-g128"))
    decoder = CudaDecoder(hollow(shape, recipe), device=torch.device("meta"))
    with recording() as launches:
        decoder._step.run()
    assert len(launches) == 4 * 64 + 2
    assert isinstance(decoder._step, Step)


def test_embeddings_that_lie_on_the_gpu_are_read_there(opened):
    decoder = opened("w4a16-g128", "both")
    embeddings, expected = decoder.embed(TOKENS[:20]), decoder.new_state()
    logits = decoder.prefill(embeddings, expected)
    assert decoder.embedding_room(30).shape == (30, 384)
    room, state = decoder.embedding_room(20), decoder.new_state()
    ctypes.memmove(room.address, embeddings.ctypes.data, embeddings.nbytes)
    assert np.array_equal(decoder.prefill(room, state), logits) and np.array_equal(state.ssm, expected.ssm)
    assert np.array_equal(decoder.forward(room, decoder.new_state())[-1:].shape, (1, 512))
    assert np.array_equal(room.rows.numpy(), embeddings)  # read, not used up


def test_activations_stay_float_and_that_is_said(exported, opened, caplog):
    with caplog.at_level("INFO"):
        decoder = CudaDecoder(exported("w4a8"), device=CPU)
    assert "activations stay float on a GPU" in caplog.text and decoder.activations == "float32"
    assert decoder.runs_on == "cpu" and decoder.stream is None


class TestRefusals:
    @pytest.fixture(autouse=True)
    def afresh(self):
        driver.why_no_torch_gpu.cache_clear()
        yield
        driver.why_no_torch_gpu.cache_clear()

    @pytest.fixture
    def gpu(self, opened, monkeypatch):
        """A driver and a torch that see a GPU; each test takes something away."""
        opened("w4a16-g128")  # made with what is really here, which is remembered
        driver.why_no_torch_gpu.cache_clear()

        def version(into):
            into._obj.value = 13000
            return 0

        library = SimpleNamespace(cuDriverGetVersion=version)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=0: "Orin")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (8, 7))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "compute_90"])
        return library

    def test_none_with_a_gpu(self, gpu):
        assert driver.why_no_torch_gpu() is None and driver.why_no_triton() is None and driver.why_no_torch_kernels() is None

    def test_no_driver(self, monkeypatch):
        def missing(name):
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", missing)
        assert "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)" in driver.why_no_torch_gpu()

    def test_no_torch(self, gpu, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert driver.why_no_torch_gpu() == f"torch is not installed ({install_hint('triton')})"
        assert driver.why_no_triton() == f"triton is not installed ({install_hint('triton')})"

    def test_torch_without_cuda(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "was built without CUDA" in driver.why_no_torch_gpu()

    def test_an_old_driver(self, gpu):
        def old(into):
            into._obj.value = 12020
            return 0

        gpu.cuDriverGetVersion = old
        assert "too old: it knows CUDA 12.2" in driver.why_no_torch_gpu() and "needs 13.0" in driver.why_no_torch_gpu()

    def test_no_gpu_is_visible(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert "sees no CUDA GPU (CUDA_VISIBLE_DEVICES is '7')" in driver.why_no_torch_gpu()

    def test_an_old_gpu(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (7, 5))
        assert "Orin has compute capability 7.5, 8.0 or later is needed" in driver.why_no_triton()
        assert "only for 8.0, 9.0" in driver.why_no_torch_kernels()

    def test_no_room(self, gpu, exported, monkeypatch):
        weights = Weights.of(exported("w4a16-g128"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**6, 8 * 10**9))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
        with pytest.raises(MachineError, match=r"Orin has no room; .* needs about 0\.\d\d GB, 0\.00 of 8\.00 GB are free"):
            cuda._require_room(torch.device("cuda", 0), needed_bytes(weights), weights.origin)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10**9)  # kept by torch for the next who asks
        cuda._require_room(torch.device("cuda", 0), needed_bytes(weights), weights.origin)

    def test_memory_that_runs_out_later(self, gpu, opened, monkeypatch):
        decoder = opened("w4a16-g128")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**6, 8 * 10**9))

        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(cuda, "run_layers", full)
        with pytest.raises(MachineError, match="reading 3 tokens: Orin has no room"):
            decoder.prefill(decoder.embed([1, 2, 3]), decoder.new_state())

    def test_a_gpu_that_fails(self, opened, monkeypatch):
        decoder = opened("w4a16-g128")

        def failing(*_):
            raise torch.AcceleratorError("an illegal memory access\nmore")

        monkeypatch.setattr(cuda, "run_layers", failing)
        with pytest.raises(MachineError, match=r"reading 3 tokens: the GPU failed \(an illegal memory access\); start again"):
            decoder.prefill(decoder.embed([1, 2, 3]), decoder.new_state())


def test_needed_memory_counts_everything_a_decoder_allocates(exported):
    weights = Weights.of(exported("w4a16-g128"))
    stored = sum(p.stat().st_size for p in exported("w4a16-g128").directory.glob("decoder.safetensors"))
    assert stored < needed_bytes(weights) < stored + 10**9
