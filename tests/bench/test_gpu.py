"""Benchmarks on a GPU, tested on the emulated one; peers on torch's "cpu" device. No speed is judged here.

Not tested, without a GPU: torch's CUDA graphs, and mamba-ssm itself. The correctness of the GPU decoder is tested in
tests/emulated.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cobra_edge.bench import command as commands
from cobra_edge.bench import decode_request, gpu, gpu_decode, gpu_gate, gpu_peers
from cobra_edge.bench.gpu import Gpu, GpuLimits, short_name
from cobra_edge.bench.gpu_gate import check_on_gpu
from cobra_edge.bench.gpu_peers import GPU_PEERS, BitsAndBytesModules, MambaSsm, check_peers
from cobra_edge.bench.gpu_runners import Ours, opened_peer
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.roofline import launches_per_token, token_bytes, weights_read_bytes
from cobra_edge.bench.runners import predictions_of
from cobra_edge.bench.transformer import Transformer, TransformerSizes
from cobra_edge.bundle.memory_plan import decoder_bytes, state_bytes
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.cuda.calls import call
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.decode.sampling import GREEDY
from cobra_edge.errors import MachineError
from cobra_edge.formats.model_config import CobraConfig, MambaConfig
from cobra_edge.formats.recipe import ROTATIONS, uniform_recipe
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.inference.generate import generate
from cobra_edge.terminal.output import progress, run_command

from ..emulated.driver import plugged_in
from ..emulated.weights import random_weights

TINY = MambaConfig(128, 2, 512, 256, 16, 4, 8)
COBRA = CobraConfig("tiny", None, None, TINY)
SMALL = TransformerSizes(32, 2, 4, 64)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Give the emulated GPU, with little to copy; what torch has of it is this processor."""
    monkeypatch.setattr(gpu, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(Gpu, "device", torch.device("cpu"))
    monkeypatch.setattr(gpu_peers, "why_no_torch_gpu", lambda: None)
    with plugged_in(tmp_path):
        yield Gpu()


@pytest.fixture
def tiny(tmp_path):
    return random_bundle(TINY, "w4a16-g128", tmp_path / "bundles" / "bench-tiny", progress())


def test_the_limits_of_a_gpu_are_rates(here):
    limits = GpuLimits(here)
    assert limits.read_bandwidth() > 0 and limits.peak_products() is None  # torch sees no GPU
    call("clearing memory", "cuMemsetD8Async", limits._memory._block.address, 0, limits._memory._half, here.stream)
    with pytest.raises(MachineError, match="test this GPU"):
        limits.read_bandwidth()


def test_memory_of_a_gpu_is_what_the_driver_counts(here):
    before = here.free_bytes()
    block = here.block(1 << 20, "a test")
    assert before - here.free_bytes() == block.nbytes == 1 << 20
    facts = here.facts()
    assert (facts["name"], facts["driver"], facts["compute_capability"]) == (here.name, "CUDA 13.0", "8.9")


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Orin (nvgpu)", "orin-nvgpu"), ("GPU", "gpu")],
)
def test_a_gpu_has_a_short_name(name, short):
    assert short_name(name) == short


@pytest.mark.parametrize("scheme", ["fp16", "w8a16-g128", "w4a16-g128"])
def test_a_token_reads_a_tied_table_once_and_of_another_only_a_row(scheme):
    tied, untied = TINY, MambaConfig(128, 2, 512, 256, 16, 4, 8, tied=False)
    recipes = [uniform_recipe(c, scheme_named(scheme))[0] for c in (tied, untied)]
    assert weights_read_bytes(tied, recipes[0]) == decoder_bytes(COBRA, recipes[0])
    whole = decoder_bytes(CobraConfig("untied", None, None, untied), recipes[1])
    table = (whole - weights_read_bytes(tied, recipes[0])) * 511 // 512
    assert weights_read_bytes(untied, recipes[1]) == whole - table
    assert token_bytes(COBRA, recipes[0]) == decoder_bytes(COBRA, recipes[0]) + 2 * state_bytes(COBRA)


def test_launches_are_counted_with_the_rotations_of_the_recipe():
    counts = {
        name: launches_per_token(TINY, uniform_recipe(TINY, scheme_named("w4a16-g128"), rotations=which)[0])
        for name, which in ROTATIONS.items()
    }
    assert counts == {"none": 11, "out-proj": 13, "residual": 13, "both": 15}


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_launches_are_those_that_the_decoder_makes(tmp_path, rotation):
    with plugged_in(tmp_path) as driver:
        weights = random_weights(TINY, "w4a16-g128", rotation)
        decoder = CudaDecoder(weights)
        state = decoder.new_state()
        logits = decoder.step(1, state)
        before = driver.launches
        tokens = list(generate(decoder, logits, state, -1, 3, GREEDY))
        assert len(tokens) == 3 and driver.launches - before == 2 * launches_per_token(TINY, weights.recipe) + 1
        facts = Ours("ours", decoder, Gpu(), {}, (1, 1)).facts()
        assert facts.backend == "cuda" and facts.described.startswith("cuda; prompts")


def test_the_gate_opens_for_the_right_decoder_and_refuses_a_wrong_one(tiny, monkeypatch):
    decoder, reference = NumpyDecoder(tiny), open_decoder(tiny, "cpu", "torch")
    found = check_on_gpu(decoder, reference, half_steps=False)
    assert found.keys() == {"together", "one by one"} and max(found.values()) < 1e-4
    for way, wrong in (
        ("forward", lambda x: x * 2),
        ("forward", np.zeros_like),
        ("step", lambda x: x * np.nan),
        ("step", lambda x: x * 1.01),
        ("step", lambda x: x[::-1].copy()),
    ):
        right = getattr(NumpyDecoder, way)
        with monkeypatch.context() as patch, pytest.raises(MachineError, match="no speed is reported"):
            patch.setattr(NumpyDecoder, way, lambda *a, right=right, wrong=wrong: wrong(right(*a)))
            check_on_gpu(NumpyDecoder(tiny), reference, half_steps=False)
    with monkeypatch.context() as patch:  # what a product in float16 may do
        right = NumpyDecoder.step
        patch.setattr(NumpyDecoder, "step", lambda *a: right(*a) * np.float32(1.01))
        check_on_gpu(NumpyDecoder(tiny), reference, half_steps=True)


def test_the_reference_is_the_native_decoder_and_numpy_where_there_is_none(tiny, monkeypatch):
    assert gpu_gate.reference_decoder(tiny).name == "native"
    monkeypatch.setattr(gpu_gate, "why_not", lambda: "the native module is missing")
    assert gpu_gate.reference_decoder(tiny).name == "numpy"


def test_the_gate_refuses_a_generation_that_differs_from_its_steps(tiny, monkeypatch):
    monkeypatch.setattr(gpu_gate, "generate", lambda *a: iter([1, 2, 3, 4]))
    with pytest.raises(MachineError, match=r"generates \[1, 2, 3, 4\], and its single steps give"):
        check_on_gpu(NumpyDecoder(tiny), open_decoder(tiny, "cpu", "torch"), half_steps=False)


def test_a_timed_answer_takes_as_many_steps_as_were_asked_for_and_leaves_its_context_alone(tiny, here, monkeypatch):
    decoder = NumpyDecoder(tiny)
    predictions = predictions_of(decoder, (8, 3), progress())
    assert [r.state.n_tokens for r in predictions.values()] == [8, 3]
    ours = Ours("ours", decoder, here, predictions, (100, 7))
    assert ours.contexts == (8, 3) and ours.traffic_bytes(8) == ours.traffic_bytes(3) == 107
    taken = []
    right = NumpyDecoder.step
    monkeypatch.setattr(NumpyDecoder, "step", lambda self, t, state: taken.append(state.n_tokens) or right(self, t, state))
    assert ours.steps(4, 3) > 0 and taken == [3, 4, 5, 6]
    assert ours.steps(1, 8) > 0 and taken[4:] == [8] and predictions[8].state.n_tokens == 8
    assert ours.prefill(5) > 0


def test_memory_that_does_not_suffice_is_explained(here):
    def opened():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    with pytest.raises(
        MachineError, match="out of GPU memory for fp16 next to the other runners; use fewer values of --scheme"
    ):
        opened_peer(here, "fp16", opened, 3)

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        opened_peer(here, "fp16", broken, 3)


def test_a_transformer_reads_its_whole_cache_at_every_step(here):
    peer = Transformer(SMALL, (4, 16), here, torch.float32)
    assert peer.contexts == (4, 16) and not peer.reads_prompts
    assert peer.traffic_bytes(16) - peer.traffic_bytes(4) == 2 * 2 * 12 * 32 * 2
    assert peer.steps(2, 16) > 0 and peer.steps(1, 4) > 0
    # 12 d² and 10 d of biases and norms a block, the last norm, the head; the embedding is only looked up.
    assert peer.weights_bytes == 4 * (2 * (12 * 32**2 + 13 * 32) + 2 * 32 + 64 * 32)


def test_a_transformer_attends_to_all_of_its_context(here):
    peer = Transformer(SMALL, (4,), here, torch.float32)
    torch.manual_seed(0)
    block, x = peer._blocks[0], torch.randn(1, 32)
    cache = torch.randn(2, 4, 4, 8)
    before = cache.clone()
    with torch.inference_mode():
        got = block(x, cache[0], cache[1])
        q, k, v = block.qkv(block.norm_attention(x)).view(3, 4, 8)
        assert torch.equal(cache[:, :, :-1], before[:, :, :-1]) and torch.equal(cache[:, :, -1], torch.stack([k, v]))
        scores = torch.einsum("hd,htd->ht", q, cache[0]) / 8**0.5
        seen = torch.einsum("ht,htd->hd", scores.softmax(-1), cache[1]).reshape(1, -1)
        mlp = block.down(torch.nn.functional.gelu(block.up(block.norm_mlp(x))))
        torch.testing.assert_close(got, x + mlp + block.out(seen))


def test_a_context_whose_cache_does_not_fit_is_left_out_and_named(here, monkeypatch):
    room = SMALL.cache_bytes(16) + (1 << 30)
    monkeypatch.setattr(Gpu, "free_bytes", lambda self, keep=False: room)
    peer = Transformer(SMALL, (16, 17), here, torch.float32)
    assert peer.contexts == (16,) and peer.facts().contexts_without_memory == (17,)
    with pytest.raises(MachineError, match="omit --peer transformer"):
        Transformer(SMALL, (17,), here, torch.float32)


def test_bitsandbytes_modules_stand_in_the_place_of_the_products(here):
    pytest.importorskip("bitsandbytes")
    peer = BitsAndBytesModules(COBRA, 3, here, torch.float32)
    quantized = [name for name, p in peer._model.named_parameters() if getattr(p, "quant_state", None) is not None]
    assert len(quantized) == 3 * TINY.n_layer and not any("dt_proj" in name for name in quantized)
    assert peer._model.lm_head.weight is peer._model.backbone.embedding.weight
    packed = sum(p.numel() for n, p in peer._model.named_parameters() if n in quantized)
    weights = TINY.n_layer * (512 * 128 + 40 * 256 + 128 * 256)
    assert packed == weights // 2
    rest = sum(p.nbytes for n, p in peer._model.named_parameters() if n not in quantized)
    assert peer.weights_bytes == packed + weights // 64 * 4 + rest
    assert peer.prefill(4) > 0 and peer.steps(2, 3) > 0
    token, state = peer._run(*peer._read)
    assert token.shape == (1, 1) and all(torch.isfinite(t).all() for t in state.ssm)


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Give stand-ins for mamba-ssm's modules, and what its generation was asked for."""
    calls = []

    class Model(torch.nn.Module):
        def __init__(self, config, device, dtype):
            super().__init__()
            self.config = config
            self.weight = torch.nn.Parameter(torch.zeros(10, dtype=dtype, device=device))

        def generate(self, tokens, max_length, top_k, cg):
            calls.append((tokens.shape[1], max_length - tokens.shape[1], top_k, cg))

    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.config_mamba", SimpleNamespace(MambaConfig=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "mamba_ssm.models.mixer_seq_simple", SimpleNamespace(MambaLMHeadModel=Model))
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", SimpleNamespace())
    monkeypatch.setattr(gpu_peers, "why_no_torch_gpu", lambda: None)
    return calls


def test_mamba_ssm_is_timed_by_its_own_generation(here, mamba_ssm):
    assert GPU_PEERS["mamba-ssm"].refuses() is None
    peer = MambaSsm(COBRA, 6, here)
    config = peer._model.config
    assert (config.d_model, config.n_layer, config.vocab_size) == (128, 2, 512)
    assert config.ssm_cfg == {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 8}
    assert peer.weights_bytes == 20 and peer.traffic_bytes(6) == 20 + 2 * state_bytes(COBRA)
    peer.steps(4, 6)
    # A first answer that is not timed, as the graph is captured in it; then the answer, and one of a single token.
    assert mamba_ssm == [(6, 5, 1, True), (6, 5, 1, True), (6, 1, 1, True)]
    peer.prefill(9)
    assert mamba_ssm[3:] == [(9, 1, 1, True)]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("selective_scan_cuda", "mamba-ssm's CUDA scan cannot be imported .*--no-build-isolation.*or omit it"),
        ("mamba_ssm.models.mixer_seq_simple", "mamba-ssm cannot be imported .*--no-build-isolation"),
    ],
)
def test_a_mamba_ssm_that_is_missing_or_without_its_scan_is_refused(mamba_ssm, monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MachineError, match=message):
        check_peers(("transformer", "mamba-ssm"))


def test_a_peer_without_a_gpu_that_torch_can_use_is_refused(mamba_ssm, monkeypatch):
    monkeypatch.setattr(gpu_peers, "why_no_torch_gpu", lambda: "this torch was built without CUDA")
    with pytest.raises(MachineError, match="--peer transformer: this torch was built without CUDA, or omit it"):
        check_peers(("transformer",))


def test_the_peers_that_may_be_named_are_those_of_the_table():
    assert tuple(GPU_PEERS) == decode_request.GPU_PEER_NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "2"], "--threads applies to the native decoder on a CPU"),
        (["--activations", "int8"], "--activations applies to the native decoder on a CPU"),
        (["--peer", "llama.cpp"], "--peer llama.cpp runs on a CPU"),
        (["--kernels", "cdua"], "unknown decoder kernels 'cdua'; did you mean 'cuda'"),
        (["--kernels", "triton"], "the decoder kernels 'triton' were removed; take 'cuda'"),
        (["--shape", "cobra-mimi"], "did you mean 'cobra-mini'"),
        (["--scheme", "w4a16"], "did you mean"),
        (["BUNDLE", "--scheme", "fp16"], "--scheme applies to random weights"),
        (["BUNDLE", "--peer", "transformer"], "give --shape instead of BUNDLE"),
    ],
)
def test_options_that_do_not_fit_a_gpu_are_refused_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["decode", "--device", "cuda", *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_without_a_gpu_or_a_peer_nothing_is_written(tmp_path, monkeypatch, capsys, here):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "why_no_gpu", lambda: "there is no NVIDIA driver")
        assert run_command(commands.command, ["decode", "--device", "cuda"]) == 3
    assert "a GPU cannot be measured: there is no NVIDIA driver; or use --device cpu" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert run_command(commands.command, ["decode", "--device", "cuda", "--peer", "mamba-ssm"]) == 3
    assert "CUDA scan" in capsys.readouterr().err and list((tmp_path / "empty").iterdir()) == []


def test_a_gpu_s_peer_is_refused_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["decode", "--peer", "transformer"]) == 2
    assert "--peer transformer runs on a GPU; give --device cuda" in capsys.readouterr().err


def test_schemes_and_peers_from_end_to_end(tmp_path, monkeypatch, capsys, here, mamba_ssm):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)

    def opened(bundle, device, kernels):
        return open_decoder(bundle, "cpu" if kernels == "bitsandbytes" else device, kernels)

    monkeypatch.setattr(gpu_decode, "open_decoder", opened)
    small = {"transformer": lambda config, contexts, gpu: Transformer(SMALL, contexts, gpu, torch.float32)}
    small["bitsandbytes"] = lambda config, contexts, gpu: BitsAndBytesModules(config, contexts[0], gpu, torch.float32)
    for name, opener in small.items():
        monkeypatch.setitem(gpu_peers.GPU_PEERS, name, gpu_peers.GpuPeer(name, lambda: None, opener))
    given = ["decode", "--device", "cuda", "--shape", "cobra-mini", "--rounds", "2", "--name", "try", "--new-tokens", "2"]
    given += ["--context", "4", "--context", "9", "--prompt-tokens", "3", "--prompt-tokens", "8"]
    given += ["--scheme", "fp16", "--scheme", "w4a16-g128", "--scheme", "bnb-nf4"]
    given += ["--peer", "transformer", "--peer", "mamba-ssm", "--peer", "bitsandbytes"]
    assert run_command(commands.command, given) == 0
    shown = capsys.readouterr().out
    assert "wrote bench/results/try.json" in shown and "first token from the image's state" in shown
    result = json.loads((tmp_path / "bench" / "results" / "try.json").read_text())
    assert result["gpu"]["name"] == here.name and result["device"] == "cuda" and result["model"] == "cobra-mini"
    (row,) = result["rows"]
    by_name = {c["name"]: c for c in row["runners"]}
    ours = ["cobra_edge fp16", "cobra_edge w4a16-g128"]
    assert list(by_name) == [*ours, "cobra_edge bnb-nf4", "mamba-ssm fp16", "bitsandbytes nf4", "transformer fp16"]
    assert row["ratios"].keys() == by_name.keys() - {"cobra_edge w4a16-g128"}
    assert list(row["ratios"]["mamba-ssm fp16"]) == ours and list(row["ratios"]["cobra_edge fp16"]) == ours[1:]
    assert row["ratios"]["bitsandbytes nf4"][ours[1]].keys() == {"decode_at_4_tok_s", "prefill_3_tok_s", "prefill_8_tok_s"}
    assert row["ratios"]["transformer fp16"][ours[1]].keys() == {"decode_at_4_tok_s", "decode_at_9_tok_s"}
    for name in ours:
        assert by_name[name]["figures"].keys() >= {"decode_at_9_share", "decode_9_over_4", "prefill_8_tok_s"}
        assert by_name[name]["prefix_reuse"]["speedup"]["median"] > 0 and by_name[name]["launches_per_token"] == 19
        assert by_name[name]["peak_bytes"] > by_name[name]["weights_bytes"] and by_name[name]["reference"] == "native"
    assert "prefix_reuse" not in by_name["cobra_edge bnb-nf4"]
    assert "decode_at_9_tok_s" not in by_name["mamba-ssm fp16"]["figures"]
    assert row["limits"]["peak_macs_per_s"] == {} and row["limits"]["read_gb_s"]["median"] > 0
