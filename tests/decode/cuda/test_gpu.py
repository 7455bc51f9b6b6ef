"""The decoder on a real GPU: what Triton's interpreter cannot show. Skipped (conftest.py), and counted, where there is none.

`make test-gpu` runs these alone. Everything is held against plain torch or numpy on the processor, or against itself.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import BACKENDS, open_decoder
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.kernels.convolution import convolve_many
from cobra_edge.decode.cuda.kernels.fused import convolve_with_causal_conv1d, scan_with_mamba_ssm
from cobra_edge.decode.cuda.kernels.scan import scan_many
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.cuda.weights import hollow
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.sampling import GREEDY, Sampling, choose
from cobra_edge.decode.torch_reference import TorchDecoder
from cobra_edge.errors import MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.bitsandbytes_codes import why_no_bitsandbytes
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.formats.recipe import ROTATIONS, uniform_recipe
from cobra_edge.formats.scheme import SCHEMES, scheme_named
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.generate import generate
from cobra_edge.inference.session import Session

from ...conftest import write_text_only
from ...tolerance import assert_close

pytestmark = pytest.mark.gpu

# No width is a power of two, dt_rank is no multiple of 16.
CONFIG = MambaConfig(384, 3, 512, 768, 16, 4, 24, tied=True)
OURS = [s for s in SCHEMES if SCHEMES[s].code_format == "int"]
FOREIGN = [s for s in SCHEMES if SCHEMES[s].code_format != "int"]
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, 300).tolist()
# Of the decoder by bitsandbytes beside plain torch over the same codes.
FOREIGN_TOLERANCE = {"bnb-nf4": "float16", "bnb-int8": "bnb-int8"}
bitsandbytes = pytest.mark.skipif(why_no_bitsandbytes() is not None, reason=f"{why_no_bitsandbytes()}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the bundle of a scheme and a rotation, exported when it is first asked for."""
    root = tmp_path_factory.mktemp("gpu")
    source = str(write_text_only(root / "mamba-tiny", config=CONFIG))

    @functools.cache
    def made(scheme, rotation):
        out = root / f"{scheme}-{rotation}"
        export_bundle(source, target_named("cpu"), out, scheme=scheme, rotation=rotation, golden_lines=2)
        return Bundle.open(out)

    return lambda scheme, rotation="none": made(scheme, rotation)


@pytest.fixture(scope="module")
def opened(exported):
    """Return the decoder of a bundle on the GPU."""
    made = functools.cache(lambda *kind: open_decoder(exported(*kind), "cuda", "triton"))
    return lambda scheme, rotation="none": made(scheme, rotation)


def both_read(ours, truth, dtype):
    """Read a prompt, every position of another, and go on from there; both states have to agree as well."""
    a, b = ours.new_state(), truth.new_state()
    embeddings = truth.embed(TOKENS)
    assert_close(ours.embed(TOKENS), embeddings, "decoder")
    assert_close(ours.forward(embeddings[:129], a), truth.forward(embeddings[:129], b), "decoder", dtype)
    assert_close(ours.prefill(embeddings[129:130], a), truth.prefill(embeddings[129:130], b), "decoder", dtype)
    assert_close(ours.prefill(embeddings[130:], a), truth.prefill(embeddings[130:], b), "decoder", dtype)
    assert_close(a.ssm, b.ssm, "decoder", dtype)
    assert_close(a.conv, b.conv, "decoder", dtype)
    assert a.n_tokens == b.n_tokens == len(TOKENS)


def both_step(ours, truth, dtype, count=6):
    a, b = ours.new_state(), truth.new_state()
    for token in TOKENS[:count]:
        assert_close(ours.step(token, a), truth.step(token, b), "decoder", dtype)
    assert_close(a.ssm, b.ssm, "decoder", dtype)
    assert_close(a.conv, b.conv, "decoder", dtype)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scheme", OURS)
def test_prompts_are_read_as_by_plain_torch(exported, opened, scheme, rotation):
    both_read(opened(scheme, rotation), TorchDecoder(exported(scheme, rotation)), "float16 products")


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("scheme", OURS)
def test_a_replayed_graph_steps_as_plain_numpy(exported, opened, scheme, rotation):
    truth = NumpyDecoder(exported(scheme, rotation), DecoderOptions(activations="float32"))
    both_step(opened(scheme, rotation), truth, "float32")


@pytest.mark.parametrize("scheme", ["w4a16-g128", "fp16"])
def test_a_graph_does_what_its_launches_do(opened, scheme):
    """Bit for bit: the same kernels in the same order."""
    decoder = opened(scheme)
    state, reference = decoder.new_state(), decoder.new_state()
    for token in TOKENS[:5]:
        replayed = decoder.step(token, state)
        with decoder._gpu("launching"):
            decoder._step.point_at(reference)
            decoder._step.token.fill_(token)
            decoder._step.run()
        assert np.array_equal(decoder._step.logits.cpu().numpy(), replayed)
    assert np.array_equal(reference.ssm, state.ssm) and np.array_equal(reference.conv, state.conv)


@pytest.mark.parametrize("scheme", OURS)
def test_the_same_tokens_give_the_same_bits(opened, scheme):
    decoder = opened(scheme)
    embeddings = decoder.embed(TOKENS)
    first, second = ((decoder.prefill(embeddings, s), s.ssm) for s in (decoder.new_state(), decoder.new_state()))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


@bitsandbytes
@pytest.mark.parametrize("scheme", FOREIGN)
def test_bitsandbytes_reads_its_own_codes(exported, scheme):
    ours = open_decoder(exported(scheme), "cuda")
    assert ours.name == "bitsandbytes"
    both_read(ours, TorchDecoder(exported(scheme)), FOREIGN_TOLERANCE[scheme])
    both_step(ours, TorchDecoder(exported(scheme)), FOREIGN_TOLERANCE[scheme])


@pytest.mark.parametrize("scheme", ["w4a16-g128", "w3a16-g64"])
def test_plain_torch_runs_there_too(exported, scheme):
    both_read(open_decoder(exported(scheme), "cuda", "torch"), TorchDecoder(exported(scheme)), "float32")


def test_the_first_choice_is_triton(exported):
    assert open_decoder(exported("w4a16-g128"), "auto").name == "triton"
    assert [b.name for b in BACKENDS if b.device == "cuda"][0] == "triton"


def test_a_snapshot_goes_to_the_host_to_a_file_and_back(exported, opened, tmp_path):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    decoder.prefill(decoder.embed(TOKENS[:40]), state)
    assert isinstance(state, GpuState) and state.tensors[0].is_cuda
    state.save(tmp_path / "state.safetensors")
    snapshot, loaded = state.host(), DecoderState.load(tmp_path / "state.safetensors", CONFIG)
    expected = decoder.step(7, state)
    for other in (decoder.new_state(like=snapshot), decoder.new_state(like=loaded), snapshot, loaded):
        assert np.array_equal(decoder.step(7, other), expected)
        assert np.array_equal(other.ssm, state.ssm) and np.array_equal(other.conv, state.conv) and other.n_tokens == 41
    processor = NumpyDecoder(exported("w4a16-g128"), DecoderOptions(activations="float32"))
    assert_close(processor.step(3, processor.new_state(like=state)), decoder.step(3, state), "decoder")


SAMPLINGS = [GREEDY, Sampling(0.8, 20, 0.9, 3), Sampling(2.0, 0, 1.0, 4), Sampling(1.0, 1, 0.5, 5), Sampling(1.5, 0, 0.7, 6)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_gpu_chooses_what_the_host_would(opened, sampling):
    decoder = opened("w8a16-g128")
    state = decoder.new_state()
    logits = decoder.prefill(decoder.embed(TOKENS[:20]), state)
    reference, rng, expected = state.copy(), np.random.default_rng(sampling.seed), []
    chosen = list(generate(decoder, logits, state, -1, 64, sampling))
    for index in range(64):
        expected.append(choose(logits, sampling, rng.random()))
        if index < 63:
            logits = decoder.step(expected[-1], reference)
    assert chosen == expected
    assert np.array_equal(state.ssm, reference.ssm) and state.n_tokens == reference.n_tokens


def test_ten_thousand_steps_take_no_more_memory(opened):
    decoder = opened("w4a16-g128")
    state = decoder.new_state()
    for token in TOKENS[:100]:
        decoder.step(token, state)
    list(generate(decoder, decoder.step(1, state), state, -1, 100, Sampling(1.0)))

    def held():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]

    before = held()
    for index in range(5_000):
        decoder.step(TOKENS[index % len(TOKENS)], state)
    list(generate(decoder, decoder.step(1, state), state, -1, 5_000, Sampling(1.0)))
    allocated, reserved, free = held()
    assert (allocated, reserved) == before[:2]
    assert free > before[2] - (64 << 20)  # others may use the GPU, too
    assert np.isfinite(state.ssm).all()


def test_two_sessions_on_one_gpu_are_nothing_to_each_other(opened, exported):
    """In turns, token by token, each says what it says alone; two decoders share nothing but the GPU."""
    first, second = opened("w4a16-g128"), CudaDecoder(exported("w8a16-g128"))

    def begun(decoder, tokens):
        state = decoder.new_state()
        return generate(decoder, decoder.prefill(decoder.embed(tokens), state), state, -1, 40, Sampling(1.0, seed=len(tokens)))

    kinds = [(first, TOKENS[:30]), (first, TOKENS[30:70]), (second, TOKENS[:31])]
    alone = [list(begun(*kind)) for kind in kinds]
    answers, together = [begun(*kind) for kind in kinds], [[], [], []]
    for _ in range(40):
        for answer, tokens in zip(answers, together, strict=True):
            tokens.append(next(answer))
    assert together == alone


def test_a_session_answers_a_follow_up(exported):
    session = Session(exported("w4a16-g128"), device="cuda")
    answer = session.ask(None, "Is it random?", max_new_tokens=8)
    answer.read()
    again = session.ask(None, "Is it random?", max_new_tokens=8)
    again.read()
    assert answer.tokens == again.tokens and isinstance(answer.state, GpuState)
    follow_up = session.ask(answer, "And now?", max_new_tokens=4)
    follow_up.read()
    assert follow_up.state.n_tokens > answer.state.n_tokens


def test_a_model_that_cannot_fit_is_refused_before_it_is_copied():
    shape = MambaConfig(2560, 20_000, 50280, 5120, 16, 4, 160)  # beyond any GPU
    recipe, _ = uniform_recipe(shape, scheme_named("w8a16-g128"))
    allocated = torch.cuda.memory_allocated()
    with pytest.raises(MachineError, match=r"has no room; the decoder of hollow weights needs about \d+\.\d\d GB"):
        CudaDecoder(hollow(shape, recipe))
    assert torch.cuda.memory_allocated() == allocated


def test_memory_that_runs_out_is_said_and_the_decoder_lives_on(exported, opened):
    decoder = opened("w4a16-g128")
    embeddings, state = decoder.embed(TOKENS * 4), decoder.new_state()
    expected = decoder.prefill(embeddings[:16], decoder.new_state())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(MachineError, match=r"reading 1200 tokens: .* has no room; .* GB are free"):
            decoder.prefill(embeddings, state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.array_equal(decoder.prefill(embeddings[:16], decoder.new_state()), expected)


class TestFused:
    """mamba-ssm's and causal-conv1d's own kernels, where they are installed, against ours."""

    @pytest.mark.parametrize("tokens", [1, 63, 129, 768])
    def test_the_scan(self, tokens):
        pytest.importorskip("selective_scan_cuda", reason="mamba-ssm's CUDA scan is not installed")
        torch.manual_seed(tokens)
        shared, carried = scan_arguments(tokens), torch.randn(768, 16, device="cuda")
        found = []
        for scan in (scan_with_mamba_ssm, scan_many):
            h, out = carried.clone(), torch.full((tokens, 768), torch.nan, dtype=torch.float16, device="cuda")
            scan(*shared, h, out)
            found.append((out.float().cpu().numpy(), h.cpu().numpy()))
        assert_close(found[0][0], found[1][0], "decoder", "float16")
        assert_close(found[0][1], found[1][1], "decoder", "float16")

    @pytest.mark.parametrize("tokens", [1, 2, 63, 768])
    def test_the_convolution(self, tokens):
        pytest.importorskip("causal_conv1d", reason="causal-conv1d is not installed")
        torch.manual_seed(tokens)
        x = torch.randn(tokens, 2 * 768, device="cuda").half()[:, :768]
        weight, bias, carried = (torch.randn(shape, device="cuda") for shape in ((768, 4), (768,), (768, 4)))
        found = []
        for convolve in (convolve_with_causal_conv1d, convolve_many):
            state, out = carried.clone(), torch.full((tokens, 768), torch.nan, dtype=torch.float16, device="cuda")
            convolve(x, state, weight, bias, out)
            found.append((out.float().cpu().numpy(), state.cpu().numpy()))
        assert_close(found[0][0], found[1][0], "decoder", "float16")
        assert_close(found[0][1], found[1][1], "decoder", "float16")

    def test_it_is_chosen_where_it_is_installed(self, opened):
        pytest.importorskip("selective_scan_cuda", reason="mamba-ssm's CUDA scan is not installed")
        assert "scan mamba-ssm" in opened("w4a16-g128").describe()


def scan_arguments(tokens):
    """Return u, dt, A, B, C, D, z and dt_bias as `scan_many` takes them."""

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, device="cuda").to(dtype)

    u, z = (random(tokens, 768, dtype=torch.float16) for _ in range(2))
    A = -torch.arange(1.0, 17, device="cuda").repeat(768, 1)
    projected = random(tokens, 56)
    return u, random(tokens, 768) - 3, A, projected[:, 24:40], projected[:, 40:], random(768), z, random(768) / 10
