"""`bench decode` on a CPU: correctness gate, rounds, llama.cpp and tables. No speed is judged here."""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench import figures
from bench.decode_goals import decode_goals_table, decode_table
from cobra_edge.bench import command as commands
from cobra_edge.bench import gate, roofline
from cobra_edge.bench.decode_result import CpuDecodeResult, Limits, RunnerFacts
from cobra_edge.bench.llamacpp import main as child_main
from cobra_edge.bench.llamacpp_runner import LlamaCppFiles, started
from cobra_edge.bench.random_bundle import random_bundle
from cobra_edge.bench.results import save_result
from cobra_edge.bench.rounds import Round, in_turns, limits_of, ratios
from cobra_edge.bench.spread import Spread, spread
from cobra_edge.bench.tables import markdown
from cobra_edge.bundle.reader import MANIFEST, Bundle
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.native.library import why_not
from cobra_edge.errors import InputError, MachineError
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.terminal.output import progress, run_command

from ..machine_case import MACHINE

TINY = MambaConfig(128, 2, 512, 256, 16, 4, 8)
native = pytest.mark.skipif(why_not() is not None, reason=f"no native decoder: {why_not()}")

# Answers as llamacpp.py does, and misbehaves when the name of the file it serves says so.
FAKE_CHILD = """
import json, pathlib, sys
command, *rest = sys.argv[1:]
def say(answer): print(json.dumps(answer), flush=True)
if command == "check":
    say(json.loads(pathlib.Path(__file__).with_name("check.json").read_text()))
elif command in ("write", "quantize"):
    goal = pathlib.Path(rest[0 if command == "write" else 1])
    goal.write_text("".join(rest[-1:]))
    say({"error": "RuntimeError: no room"} if "refused" in goal.name else {"done": command})
else:
    kind = pathlib.Path(rest[0]).name
    if kind == "dead": sys.exit("no such model")
    if kind == "garbage": print("llama_model_loader: hello", flush=True)
    say({"version": "0", "weights_bytes": 1000} if kind != "nameless" else {})
    for line in sys.stdin:
        order = json.loads(line)
        if kind == "dies": sys.exit("ggml_abort: out of slots")
        if kind == "fails": say({"error": "RuntimeError: llama_decode ended with 1"})
        elif kind == "mute": say({"seconds": None})
        else: say({"seconds": float(order.get("prefill", 0) + 1000 * order.get("steps", 0))})
"""


@pytest.fixture
def llama_cpp(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(FAKE_CHILD)
    (tmp_path / "check.json").write_text('{"done": "check"}')
    return LlamaCppFiles("mini", TINY, tmp_path / "files", (sys.executable, str(script)))


@pytest.fixture
def tiny(tmp_path):
    return random_bundle(TINY, "w4a16-g128", tmp_path / "bundles" / "bench-tiny", progress())


def test_a_random_bundle_is_made_once_and_anew_where_it_does_not_fit(tiny):
    manifest = tiny.path(MANIFEST)
    before = manifest.stat().st_mtime_ns
    assert random_bundle(TINY, "w4a16-g128", tiny.directory, progress()) == tiny
    assert manifest.stat().st_mtime_ns == before
    other = random_bundle(TINY, "w8a16-g128", tiny.directory, progress())
    assert other.manifest.recipe.scheme == "w8a16-g128"
    manifest.write_text("{}")
    assert random_bundle(TINY, "w4a16-g128", tiny.directory, progress()).manifest.recipe == tiny.manifest.recipe


@pytest.mark.parametrize("bits", [4, 8])
def test_random_codes_stand_for_weights_of_one_size(tmp_path, bits):
    bundle = random_bundle(TINY, f"w{bits}a16-g128", tmp_path / "b", progress())
    weights = bundle.decoder_tensors()["backbone.layers.1.mixer.in_proj.weight"].dequantize()
    assert weights.std() == pytest.approx(TINY.d_model**-0.5, rel=0.05)


@native
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_the_gate_opens_for_the_right_decoder_and_refuses_a_wrong_one(tiny, activations, monkeypatch):
    options = DecoderOptions(activations=activations)
    assert gate.check(tiny, options, "auto", progress()) < 0.05
    right = CpuDecoder.forward
    for wrong in (lambda x: x * 2, np.zeros_like, lambda x: x * np.nan, lambda x: x[:, ::-1]):
        monkeypatch.setattr(CpuDecoder, "forward", lambda *a, wrong=wrong: wrong(right(*a)))
        with pytest.raises(MachineError, match="no speed is reported"):
            gate.check(tiny, options, "auto", progress())


@native
def test_the_command_keeps_nothing_of_a_wrong_decoder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CpuDecoder, "forward", lambda self, rows, state: np.ones((len(rows), self.config.vocab), np.float32))
    assert run_command(commands.command, ["decode", "--shape", "cobra-mini"]) == 3
    assert "no speed is reported" in capsys.readouterr().err and not (tmp_path / "bench").exists()


def test_turns_go_round_and_ratios_are_taken_within_a_round():
    class Named:
        def __init__(self, name):
            self.name = name

    turns = []
    runners = [Named("a"), Named("b"), Named("peer")]
    for index in range(3):
        in_turns(runners, index, lambda c: turns.append(c.name) or {})
    assert turns == ["a", "b", "peer", "peer", "b", "a", "a", "b", "peer"]

    def one(ours, theirs, peak):
        a = {"decode_at_64_tok_s": ours, "decode_at_999_tok_s": 1.0, "decode_at_64_share": 0.5}
        peer = {"decode_at_64_tok_s": theirs, "prefill_1_tok_s": 1.0, "decode_at_64_share": 0.5}
        return Round((2e9, 4e9), {"avx2": peak}, {"a": a, "peer": peer})

    rounds = [one(2.0, 1.0, 5.0), one(12.0, 4.0, 8.0), one(90.0, 9.0, 7.0)]
    assert ratios(rounds, ["a"], "peer") == {"a": {"decode_at_64_tok_s": Spread(3.0, 2.0, 10.0)}}
    assert limits_of(rounds) == Limits(Spread(3.0, 2.0, 4.0), {"avx2": Spread(7.0, 5.0, 8.0)})
    assert spread([3, 1, 2, 10]) == Spread(2.5, 1, 10)


def test_products_of_a_prompt_are_counted_with_one_head():
    one, two = (roofline.prefill_products(TINY, n) for n in (1, 2))
    layer = 512 * 128 + (8 + 32) * 256 + 256 * 8 + 128 * 256
    assert two - one == 2 * layer and one == 2 * layer + 512 * 128


def test_a_peer_is_made_once_and_answers(llama_cpp, tmp_path):
    llama_cpp.check([4, 8, 16])
    file, file_type = llama_cpp.file(4, progress())
    assert file_type == "Q4_0" and file == tmp_path / "files" / "bench-mini-Q4_0.gguf" and file.read_text() == "Q4_0"
    source = tmp_path / "files" / "bench-mini-F16.gguf"
    assert json.loads(source.read_text())["d_inner"] == 256
    file.write_text("kept")
    assert llama_cpp.file(4, progress())[0].read_text() == "kept"
    assert llama_cpp.file(16, progress()) == (source, "F16")
    with llama_cpp.opened(file, file_type, 2, 64) as peer:
        assert peer.name == "llama.cpp Q4_0" and peer.contexts == (64,) and peer.weights_bytes == 1000
        assert peer.facts().activations == "int8" and peer.facts().threads == 2
        assert peer.prefill(7) == 7 and peer.steps(3, 64) == 3000
    assert sorted(f.name for f in (tmp_path / "files").iterdir()) == [source.name, file.name]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dead", "exit code 1 .no such model"),
        ("dies", "exit code 1 .ggml_abort: out of slots"),
        ("garbage", "'llama_model_loader: hello', expected one JSON"),
        ("fails", "llama_decode ended with 1"),
        ("mute", "expected seconds"),
        ("nameless", "no weights_bytes"),
    ],
)
def test_a_peer_that_fails_says_why(llama_cpp, kind, message):
    with pytest.raises(MachineError, match=message), llama_cpp.opened(Path(kind), "Q4_0", 2, 64) as peer:
        peer.prefill(3)


def test_a_failed_file_leaves_nothing(llama_cpp, tmp_path):
    refused = LlamaCppFiles("refused", TINY, tmp_path / "files", (sys.executable, str(tmp_path / "child.py")))
    with pytest.raises(MachineError, match="no room"):
        refused.file(4, progress())
    assert list((tmp_path / "files").iterdir()) == []


def test_a_missing_library_or_interpreter_or_format_is_explained(llama_cpp, tmp_path):
    (tmp_path / "check.json").write_text(json.dumps({"error": "ModuleNotFoundError: No module named 'llama_cpp'"}))
    with pytest.raises(MachineError, match=r"pip install '\.\[peers\]' there, or name .* --peer-python"):
        llama_cpp.check([4])
    with pytest.raises(InputError, match="no 5-bit format"):
        llama_cpp.check([5])
    with pytest.raises(InputError, match="cannot be started"):
        LlamaCppFiles("mini", TINY, tmp_path, ("/no/such/python", "child.py")).check([4])


def test_the_child_ends_with_its_block():
    with (
        pytest.raises(KeyError),
        started([sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(60)"]) as child,
    ):
        child.answer()
        began, pid = time.monotonic(), child._process.pid
        raise KeyError
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_child_reports_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    child_main(["check"])
    assert "gguf" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["BUNDLE", "--peer", "llama.cpp"], "give --shape instead of BUNDLE"),
        (["BUNDLE", "--scheme", "fp16"], "--scheme applies to random weights"),
        (["BUNDLE", "--shape", "cobra-3b"], "--shape applies to random weights"),
        (["--shape", "cobra-mimi"], "did you mean 'cobra-mini'"),
        (["--shape", "cobra-mini", "--scheme", "w4a16"], "did you mean"),
        (["--shape", "cobra-mini", "--kernels", "avx3"], "no kernels 'avx3' on this processor"),
        (["--shape", "cobra-mini", "--name", "../x"], "is not a valid result name"),
    ],
)
@native
def test_options_that_do_not_fit_are_refused_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(commands.command, ["decode", *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@native
def test_decode_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(roofline, "_BANDWIDTH_BYTES", 1 << 20)
    small = ["--context", "8", "--context", "32", "--prompt-tokens", "16", "--new-tokens", "2", "--threads", "1"]
    schemes = ["--scheme", "w4a16-g128", "--scheme", "fp16"]
    given = ["decode", "--shape", "cobra-mini", "--rounds", "1", "--kernels", "scalar", "--name", "try", *small, *schemes]
    assert run_command(commands.command, given) == 0
    shown = capsys.readouterr().out
    assert "decode at 8" in shown and "wrote bench/results/try.json" in shown
    assert [f.name for f in (tmp_path / "bench" / "results").iterdir()] == ["try.json"]
    result = json.loads((tmp_path / "bench" / "results" / "try.json").read_text())
    four, half = result["rows"]
    assert [c["activations"] for c in four["runners"]] == ["int8", "float32"]
    assert [c["activations"] for c in half["runners"]] == ["float32"]
    for row in (four, half):
        assert row["peer"] is None and row["ratios"] == {} and row["threads"] == 1
        assert row["startup"]["peak_bytes"] > 1 << 20 and row["startup"]["open_seconds"] > 0
        assert row["prefix_reuse"]["speedup"]["median"] > 1
        for runner in row["runners"]:
            assert runner["kernels"] == "scalar"
            wanted = {"decode_at_8_tok_s", "decode_at_8_share", "decode_32_over_8", "prefill_16_tok_s", "prefill_16_macs_per_s"}
            assert wanted <= runner["figures"].keys()
            assert all(0 < v["low"] <= v["median"] <= v["high"] for v in runner["figures"].values())
    kept = msgspec.convert(result, CpuDecodeResult)
    assert "w4a16-g128" in markdown([decode_table(kept)])


@native
def test_a_peer_takes_turns_and_only_int8_products_have_a_share_of_the_peak(tiny, monkeypatch):
    from cobra_edge.bench import decode as module

    monkeypatch.setattr(roofline, "_BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(module, "peak_products", lambda kernels, threads: 1e9)
    plan = module.Plan((8,), (4,), 2, 1, 1, ("int8", "float32"), "auto")

    class Twice:
        name, contexts, weights_bytes = "peer", (4,), 10

        def facts(self):
            return RunnerFacts(activations="int8")

        def prefill(self, tokens):
            return 1.0

        def steps(self, count, context):
            return 1.0

    row = module.measure_bundle(Bundle.open(tiny.directory), plan, nullcontext(Twice()), progress())
    assert row.peer == "peer" and row.ratios.keys() == {"cobra_edge int8", "cobra_edge float32"}
    assert row.ratios["cobra_edge int8"].keys() == {"decode_at_4_tok_s", "prefill_8_tok_s"}
    shares = ["prefill_8_peak_share" in runner.figures for runner in row.runners]
    assert shares == [True, False, True]  # int8 products, for those that take them


def test_a_result_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_result("x", {"a": 1})
    with pytest.raises(TypeError):
        save_result("x", {"a": object()})
    assert json.loads(Path("bench/results/x.json").read_text()) == {"a": 1}
    assert os.listdir("bench/results") == ["x.json"]


def made_up(share=0.85, ratio=1.9, steady=0.99, open_seconds=0.4):
    def alike(value):
        return {"median": value, "low": value * 0.9, "high": value * 1.1}

    def runner(name, rate, **facts):
        found = {"decode_at_64_tok_s": alike(rate), "decode_at_64_share": alike(share), "prefill_256_tok_s": alike(40.0)}
        own = {"decode_16384_over_64": alike(steady)} if "kernels" in facts else {}
        return {"name": name, "weights_bytes": 1, "figures": found | own, **facts}

    row = {
        "scheme": "w4a16-g128",
        "batch": 1,
        "new_tokens": 16,
        "decoder_bytes": 1,
        "relative_rms_from_numpy": {},
        "threads": 2,
        "rounds": 5,
        "prompt_tokens": [256],
        "contexts": [64, 16384],
        "limits": {"read_gb_s": alike(28.0), "peak_macs_per_s": {}},
        "runners": [
            runner("cobra_edge int8", 16.2, kernels="avx2", activations="int8"),
            runner("llama.cpp Q4_0", 9.0, version="llama-cpp-python 9.9", built_for="CPU : AVX = 1 | AVX2 = 1 | AVX512 = 0 |"),
        ],
        "peer": "llama.cpp Q4_0",
        "ratios": {"cobra_edge int8": {"decode_at_64_tok_s": alike(ratio), "prefill_256_tok_s": alike(1.5)}},
        "startup": {
            "activations": "int8",
            "prompt_tokens": 768,
            "open_seconds": open_seconds,
            "first_open_seconds": 4.0,
            "peak_bytes": 1_700_000_000,
            "limit_bytes": 2_000_000_000,
        },
        "prefix_reuse": {
            "visual_tokens": 729,
            "question_tokens": 24,
            "rounds": 3,
            "state_file_bytes": 1,
            "part": "decoder",
            "scratch_seconds": alike(2.0),
            "reuse_seconds": alike(0.1),
            "speedup": alike(20.0),
        },
    }
    return {"model": "cobra-3b", "weights": "random", "device": "cpu", "rows": [row], "machine": MACHINE}


def result_of(made):
    return msgspec.convert(msgspec.to_builtins(made), CpuDecodeResult)


def test_the_tables_of_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    text = "<!-- table: decode -->\n<!-- end -->\n<!-- table: decode_goals -->\n<!-- end -->\n"
    assert figures.with_tables(text).count("\nnot measured\n") == 2
    (tmp_path / "cpu-decode.json").write_bytes(msgspec.json.encode(made_up()))
    shown = figures.with_tables(text)
    assert "A Processor, 2 cores, 25.0 GB" in shown and "28.0 GB/s" in shown
    assert "| cobra_edge int8 | avx2 | 16.2 (14.6–17.8) | 85% | 40.0 (36.0–44.0) | 1.90 | 1.50 |" in shown
    assert "| llama.cpp Q4_0 (llama-cpp-python 9.9) | AVX2 | 9.0" in shown
    for line in (
        "| 1.90, reached |",
        "| 85%, reached |",
        "| 1.50, **missed** |",
        "| 0.990, reached |",
        "| 0.40, reached (",
        "1.70, reached",
    ):
        assert line in shown
    (tmp_path / "cpu-decode-avx2.json").write_bytes(msgspec.json.encode(made_up()))
    assert figures.with_tables(text).count("A Processor") == 2
    worse = markdown([decode_goals_table([result_of(made_up(share=0.79, ratio=1.4, steady=1.04, open_seconds=1.0))])])
    assert worse.count("**missed**") == 5 and worse.count("reached") == 1
    alone = made_up()
    alone["rows"][0] |= {"peer": None, "ratios": {}, "runners": alone["rows"][0]["runners"][:1]}
    assert markdown([decode_goals_table([result_of(alone)])]).count("not measured") == 2
