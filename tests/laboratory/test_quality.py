"""`python -m bench.quality`: intervals, bits, peers and goals. The quality of builds is measured, not tested."""

import json
import sys

import msgspec
import numpy as np
import pytest

from bench import quality_comparison
from bench.builds import BUILDS, DEFAULT, DEFAULT_ON_GPU
from bench.drift_plot import draw_drift, frontier
from bench.figures import quality_result
from bench.headline import HEADLINE
from bench.held_out import Answers, against, figures
from bench.quality import quality
from bench.quality_comparison import require_agreement
from bench.quality_llamacpp import LlamaCppLibrary
from bench.quality_result import (
    GOALS,
    Comparison,
    NotMeasured,
    QualityRow,
    TaskAccuracy,
    goals_table,
    quality_goals_table,
    quality_summary,
    quality_table,
)
from bench.quality_torch import TorchLibrary, TorchPeer
from bench.stored_bits import bundle_bits, gguf_bits, matrix_names, with_float_rest
from cobra_edge.bench.llamacpp import main as child_main
from cobra_edge.bench.llamacpp import sizes_of, translated, write_gguf
from cobra_edge.bench.tables import markdown
from cobra_edge.bundle.reader import Bundle
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.export.options import ExportOptions, choose
from cobra_edge.formats.model_config import MambaConfig, decoder_shapes
from cobra_edge.formats.recipe import ROTATIONS, activations_of
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.regress import intervals
from cobra_edge.regress.intervals import Interval
from cobra_edge.suite.line import Line
from cobra_edge.suite.tokenized import TokenizedLine, TokenizedSuite
from cobra_edge.terminal.output import run_command

from ..conftest import MINI_MAMBA, random_tensors

TINY = MambaConfig(128, 2, 512, 256, 16, 4, 8)
TINY_MATRICES = 512 * 128 + 2 * (512 * 128 + 40 * 256 + 256 * 8 + 128 * 256)  # embedding, then in, x, dt and out of each layer


def tokenized(images, tasks, prompts, answers):
    lines = [
        TokenizedLine(i, Line("q", "a", task), tuple(prompt), list(answer), image)
        for i, (image, task, prompt, answer) in enumerate(zip(images, tasks, prompts, answers, strict=True), 1)
    ]
    embeddings = np.random.default_rng(0).standard_normal((3, 4, 128)).astype(np.float32)
    return TokenizedSuite("by hand", lines, ["a.png", "b.png", "c.png"], lambda image: b"", {}, embeddings)


@pytest.fixture
def suite():
    """Three images, five lines, a vocabulary of 512, two tokens of prompt and one or two of answer."""
    tasks = ("count", "caption", "count", "count", "caption")
    return tokenized([0, 0, 1, 2, 2], tasks, [[5, 6]] * 5, ([1, 0], [2, 0], [0], [3, 0], [1, 0]))


def saying(tokens, sure=4.0):
    logits = np.zeros((len(tokens), 512), np.float32)
    logits[np.arange(len(tokens)), tokens] = sure
    return logits


def test_a_row_by_hand(suite):
    reference = [saying(line.answer) for line in suite.lines]
    wrong = [reference[0], saying([2, 4]), saying([0], sure=3.0), saying([3, 0], sure=3.0), reference[4]]
    truth, found = (Answers.of(logits, reference, suite) for logits in (reference, wrong))
    row = figures(found, truth, suite)

    def kl(p, q):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (p.astype(float), q.astype(float)))
        return (p * np.log(p / q)).sum()

    swapped, softer = kl(saying([0])[0], saying([4])[0]), kl(saying([0])[0], saying([0], sure=3.0)[0])
    assert row.lines == 5 and row.images == 3 and row.answer_tokens == 9
    assert row.kld_mean.value == pytest.approx((swapped + 3 * softer) / 9, rel=1e-5)
    interval = intervals.mean(np.array([swapped, softer, 2 * softer]), np.array([4.0, 1.0, 4.0]))  # images of 4, 1 and 4 tokens
    assert (row.kld_mean.low, row.kld_mean.high) == pytest.approx((interval.low, interval.high), rel=1e-5)
    assert row.top1_agreement.value == pytest.approx(8 / 9, rel=1e-5)
    lost = 4.0 + 3 * (np.log(511 + np.exp(3)) - 3 - np.log(511 + np.exp(4)) + 4)
    assert row.perplexity_ratio.value == pytest.approx(np.exp(lost / 9), rel=1e-5)
    assert row.accuracy["count"] == TaskAccuracy(3, 1.0, Interval(0.0, 0.0, 0.0))
    assert row.accuracy["caption"].right == 0.5
    assert row.accuracy["caption"].difference.value == -0.5
    pair = against(found, found, suite)
    assert pair.kld_ratio.low == pair.kld_ratio.high == 1 and pair.kld_difference.high == 0
    assert against(found, truth, suite).kld_ratio is None


def test_a_float_form_that_disagrees_is_refused(suite):
    reference = [saying(line.answer) for line in suite.lines]
    assert require_agreement("x", reference, reference) == 0
    for other in ([2 * r for r in reference], [r * np.nan for r in reference]):
        with pytest.raises(MachineError, match="x with float weights differs from the reference: mean KLD"):
            require_agreement("x", other, reference)


def test_bits_by_hand(tiny_bundle):
    """tiny_bundle is w8a16-g128: 8 bits and a float16 scale for 128 weights; dt_proj, 8 wide, has one for each row."""
    bundle = Bundle.open(tiny_bundle)
    assert bundle.manifest.recipe.scheme == "w8a16-g128" and bundle.manifest.model.mamba == TINY
    narrow = 2 * 256 * 8
    expected = ((TINY_MATRICES - narrow) * 8.125 + narrow * 8 + 2 * 256 * 16) / TINY_MATRICES
    assert bundle_bits(bundle).matrices == pytest.approx(expected)
    file_bytes = bundle.path("decoder.safetensors").stat().st_size
    assert bundle_bits(bundle).all == pytest.approx(8 * file_bytes / TINY.n_parameters)


def test_bits_of_peers_by_hand():
    names = [n for n in matrix_names(TINY) if "in_proj" in n]
    found = with_float_rest(TINY, names, 2 * 512 * 128 // 2)
    assert found.matrices == pytest.approx((2 * 512 * 128 * 4 + (TINY_MATRICES - 2 * 512 * 128) * 16) / TINY_MATRICES)
    vectors = TINY.n_parameters - TINY_MATRICES
    assert found.all == pytest.approx((found.matrices * TINY_MATRICES + 32 * vectors) / TINY.n_parameters)
    sizes = {
        "token_embd.weight": 1000,
        "blk.0.ssm_in.weight": 200,
        "blk.1.ssm_dt.weight": 30,
        "blk.0.ssm_a": 9,
        "output_norm.weight": 9,
    }
    assert gguf_bits(TINY, sizes, 5000).matrices == 8 * 1230 / TINY_MATRICES
    assert gguf_bits(TINY, sizes, 5000).all == 8 * 5000 / TINY.n_parameters


@pytest.fixture
def tensors():
    return {name: t.numpy() for name, t in random_tensors(decoder_shapes(TINY)).items()}


def test_a_gguf_holds_the_decoder(tmp_path, tensors):
    gguf = pytest.importorskip("gguf")
    import msgspec

    file = tmp_path / "F32.gguf"
    write_gguf(file, msgspec.to_builtins(TINY), translated(tensors))
    reader = gguf.GGUFReader(file)
    found = {t.name: t.data.reshape(t.shape[::-1]) for t in reader.tensors}
    assert len(found) == len(tensors) and "output.weight" not in found
    np.testing.assert_array_equal(found["blk.1.ssm_in.weight"], tensors["backbone.layers.1.mixer.in_proj.weight"])
    np.testing.assert_array_equal(found["blk.1.ssm_a"], -np.exp(tensors["backbone.layers.1.mixer.A_log"]))
    np.testing.assert_array_equal(found["blk.0.ssm_conv1d.weight"], tensors["backbone.layers.0.mixer.conv1d.weight"][:, 0])
    np.testing.assert_array_equal(found["blk.0.ssm_dt.bias"], tensors["backbone.layers.0.mixer.dt_proj.bias"])
    np.testing.assert_array_equal(found["token_embd.weight"], tensors["backbone.embedding.weight"])
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert reader.fields["mamba.ssm.inner_size"].contents() == 256
    sizes = sizes_of(file)
    assert sizes["tensors"]["blk.0.ssm_dt.weight"] == ["F32", 4 * 256 * 8]
    assert sizes["file_bytes"] == file.stat().st_size


def test_a_tensor_without_a_place_is_refused(tmp_path, tensors, capsys):
    odd = {"backbone.layers.0.mixer.gate": np.ones(3)}
    with pytest.raises(ValueError, match=r"mixer\.gate does not exist in a GGUF"):
        translated(tensors | odd)
    np.savez(tmp_path / "w.npz", **odd)
    child_main(["write", str(tmp_path / "x.gguf"), "{}", str(tmp_path / "w.npz")])
    assert "does not exist" in json.loads(capsys.readouterr().out)["error"]


# Answers as llamacpp.py does: everybody says the target. Misbehaves as the file `kind` beside it says.
FAKE_CHILD = """
import json, pathlib, sys
import numpy as np
command, *rest = sys.argv[1:]
kind = pathlib.Path(__file__).with_name("kind").read_text()
def say(answer): print(json.dumps(answer), flush=True)
if kind == "missing": say({"error": "ModuleNotFoundError: No module named 'llama_cpp'"})
elif kind == "broken" and command != "check": say({"error": "RuntimeError: llama_decode ended with 1"})
elif command == "check": say({"done": command, "version": "llama 9"})
elif command == "write":
    pathlib.Path(rest[0]).write_text(",".join(np.load(rest[2])))
    say({"done": command})
elif command == "quantize": say({"done": command})
elif command == "sizes": say({"done": command, "file_bytes": 5000, "tensors": {"token_embd.weight": ["Q4_0", 1000]}})
else:
    q = np.load(rest[1])
    n = int((q["length"] - q["answer_from"]).sum()) + (kind == "long")
    say({"lines": 2})
    np.savez(rest[2], logits=np.arange(n * 512, dtype=np.float32).reshape(n, 512))
    say({"done": command})
"""


@pytest.fixture
def llama_cpp(tmp_path, tensors):
    (tmp_path / "child.py").write_text(FAKE_CHILD)
    (tmp_path / "kind").write_text("good")
    return LlamaCppLibrary(TINY, tensors, tmp_path, sys.executable, tmp_path / "child.py")


def test_llama_cpp_answers(llama_cpp, suite, tmp_path):
    assert llama_cpp.refuses() is None
    told = []
    found = llama_cpp.answer("llama.cpp Q4_0", suite, told.append)
    assert told == [2] and [f.shape for f in found.logits] == [(len(line.answer), 512) for line in suite.lines]
    assert found.logits[2][0, 0] == 4 * 512  # the fifth answer token
    assert found.bits.matrices == 8 * 1000 / TINY_MATRICES and found.facts["runtime"] == "llama 9"
    assert "backbone.layers.1.mixer.A_log" in (tmp_path / "F32.gguf").read_text()
    asked = np.load(tmp_path / "questions.npz")
    assert asked["tokens"][:5].tolist() == [5, 6, 1, 5, 6] and asked["length"].tolist() == [3, 3, 2, 3, 3]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("broken", "llama_decode ended with 1"), ("long", r"logits of shape \(10, 512\), expected \(9, 512\)")],
)
def test_llama_cpp_that_fails_says_why(llama_cpp, suite, tmp_path, kind, message):
    (tmp_path / "kind").write_text(kind)
    with pytest.raises(MachineError, match=message):
        llama_cpp.answer_in_float(suite, lambda _: None)


def test_a_missing_library_is_a_reason_and_a_missing_interpreter_an_error(llama_cpp, tmp_path, tensors):
    (tmp_path / "kind").write_text("missing")
    assert "No module named 'llama_cpp'" in llama_cpp.refuses() and "--peer-python" in llama_cpp.refuses()
    with pytest.raises(InputError, match="cannot be started"):
        LlamaCppLibrary(TINY, tensors, tmp_path, "/no/such/python").refuses()

    def absent():
        raise ImportError("No module named 'hqq'")

    library = TorchLibrary("hqq", (TorchPeer("hqq int4", 4, absent),), TINY, tensors)
    assert library.refuses() == f"hqq: No module named 'hqq'; {install_hint('peers')}"


def test_a_torch_peer_answers_as_the_model_does(suite, tensors):
    """A quantizer that rounds nothing but to float16 leaves the answers nearly what they are; one that zeroes does not."""

    def keeps(layer):
        return layer, layer.weight.nbytes

    def zeroes(layer):
        layer.weight.data.zero_()
        return layer, 0

    peers = (TorchPeer("keeps", 16, lambda: keeps), TorchPeer("zeroes", 0, lambda: zeroes))
    library = TorchLibrary("torch", peers, TINY, tensors)
    assert library.refuses() is None
    told = []
    reference = library.answer_in_float(suite, told.append)
    assert told == [1, 2, 3, 4, 5] and [r.shape for r in reference] == [(len(line.answer), 512) for line in suite.lines]
    kept, lost = (library.answer(label, suite, lambda _: None) for label in ("keeps", "zeroes"))
    drifts = [Answers.of(f.logits, reference, suite).kld_of_lines.sum() for f in (kept, lost)]
    assert 0 < drifts[0] < 1e-4 < drifts[1]
    assert kept.bits.matrices == 16 and lost.bits.matrices < 8 and "embedding" in kept.facts["left_float"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "w4a16-g12"], "unknown build 'w4a16-g12'; did you mean"),
        (["--name", "../x"], "is not a valid result name"),
    ],
)
def test_options_are_checked_before_any_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(quality, options) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_labels_are_unique():
    labels = quality_comparison.known_labels()
    assert len(set(labels)) == len(labels) and {b.label for b in BUILDS} < set(labels)


FACTS = {"runtime": "stub", "activations": "float32"}


class Stub:
    """A library whose float form is off by `off`, and whose peer says what the reference does."""

    def __init__(self, reference, reason=None, off=0.0):
        self.name, self.peers, self._reference, self._reason, self._off = "stub", {"stub": 4}, reference, reason, off

    def refuses(self):
        return self._reason

    def answer_in_float(self, suite, on_lines):
        return [r + self._off * np.arange(512) for r in self._reference]

    def answer(self, label, suite, on_lines):
        from bench.quality_llamacpp import RunnerOutput

        return RunnerOutput(self._reference, with_float_rest(TINY, [], 0), FACTS)


def test_rows_of_builds_and_peers(suite, monkeypatch, tmp_path):
    from bench.builds import Build
    from bench.quality_llamacpp import RunnerOutput

    logits = [saying(line.answer) for line in suite.lines]
    bits = with_float_rest(TINY, [], 0)

    def rows_of_reference():
        return quality_comparison._Rows(suite, RunnerOutput(logits, bits, FACTS))

    with pytest.raises(MachineError, match="stub with float weights differs"):
        rows_of_reference().add_library(Stub(logits, off=1.0), ["stub"])
    found = rows_of_reference()
    found.add_library(Stub(logits, reason="no such library"), ["stub"])

    def run(build, folder, lines):
        if build.label == "lacking":
            raise MachineError("no bitsandbytes")
        return None, None, RunnerOutput([2 * r for r in logits], bits, FACTS)

    monkeypatch.setattr(quality_comparison, "_run_build", run)
    found.add_build(Build("a", {"scheme": "w4a16-g128"}), tmp_path, [])
    found.add_build(Build("lacking", {"scheme": "bnb-nf4"}, peer=True), tmp_path, [])
    with pytest.raises(MachineError, match="no bitsandbytes"):
        found.add_build(Build("lacking", {"scheme": "w4a16-g128"}), tmp_path, [])
    made = found.comparison()
    assert [(r.label, r.kind) for r in made.rows] == [("fp16", "reference"), ("a", "ours")]
    assert [(m.label, m.reason) for m in made.not_measured] == [("stub", "no such library"), ("lacking", "no bitsandbytes")]
    assert made.rows[1].kld_mean.low > 0 and made.rows[1].against == {}
    assert "stub: not measured: no such library" in quality_summary(made).notes
    assert msgspec.json.encode(made)


def made_up(label, kind, bits, matrices, kld, lost=0.0, ratio=None, activations="float32"):
    def sure(value):
        return {"value": value, "low": value, "high": value}

    accuracy = {t: {"lines": 100, "right": 0.99, "difference": sure(0.0)} for t in (*GOALS, "caption")}
    accuracy["count"]["difference"] = {"value": -lost, "low": -lost - 0.02, "high": 0.0}
    row = {"label": label, "kind": kind, "weight_bits": bits, "bits_matrices": matrices, "bits_all": matrices + 1}
    row |= {"runtime": "x", "lines": 1, "images": 1, "answer_tokens": 1}
    row |= {"activations": activations, "kld_mean": sure(kld), "kld_p99": sure(kld), "top1_agreement": sure(1.0)}
    row |= {"perplexity_ratio": sure(1.0), "accuracy": accuracy, "caption_perplexity": 1.05}
    compared = {name: {"kld_difference": sure(0.0), "kld_ratio": r} for name, r in (ratio or {}).items()}
    return msgspec.convert(row | {"against": compared}, QualityRow)


def test_goals_are_judged_from_the_rows(tmp_path):
    below, over = {"value": 0.15, "low": 0.12, "high": 0.2}, {"value": 1.2, "low": 0.9, "high": 1.5}
    rows = [
        made_up("fp16", "reference", 16, 16.0, 0.0),
        made_up("best, w8a16-g128", "ours", 8, 8.2, 1e-5, ratio={"llama.cpp Q8_0": below}),
        made_up(DEFAULT_ON_GPU, "ours", 4, 4.3, 1e-3, lost=0.005, ratio={"llama.cpp Q4_K_M": below, "B": over}),
        made_up("best, 3.5 bits", "ours", 4, 3.5, 1e-4, lost=0.02, ratio={"llama.cpp Q4_K_M": below}),
        made_up("four", "ours", 4, 4.2, 1e-3),
        made_up("llama.cpp Q4_K_M", "peer", 4, 4.8, 2e-3),
        made_up("B", "peer", 4, 4.8, 2e-3),
        made_up("llama.cpp Q8_0", "peer", 8, 8.6, 3e-5),
    ]
    result = Comparison(rows=tuple(rows), not_measured=(NotMeasured("C", 4, "no library"),))
    text = markdown([quality_goals_table(result)])
    for line in (
        f"at most 1/6 of that of llama.cpp Q4_K_M | {DEFAULT_ON_GPU} | 0.150 (0.120–0.200) times | reached, but the interval",
        f"at most 1/12 of that of bitsandbytes nf4 | {DEFAULT_ON_GPU} | not measured |  |",
        "at most 1/2 of that of llama.cpp Q4_K_M | best, 3.5 bits | 0.150 (0.120–0.200) times | reached |",
        f"below that of B | {DEFAULT_ON_GPU} | 1.200 (0.900–1.500) times | **missed**, but the interval contains the limit |",
        f"below that of C | {DEFAULT_ON_GPU} | not measured |  |",
        "llama.cpp Q8_0 | best, w8a16-g128 | 0.150 (0.120–0.200) times | reached |",
        "every task within 1 point of float | best, 3.5 bits | count -2.0 (-4.0–+0.0) | **missed**, but the interval ",
        f"every task within 1 point of float | {DEFAULT_ON_GPU} | count -0.5 (-2.5–+0.0) | reached, but the interval ",
        "every task within 0.2 points of float | best, w8a16-g128 | count",
    ):
        assert line in text, line
    assert "reached" not in markdown([quality_goals_table(Comparison(rows=tuple(rows[:1])))])
    shown = markdown([quality_table(result)])
    assert "| C (not measured: no library) | – |" in shown and "| four | 4.20 | 5.20 | float32 | 1.00e-03 (" in shown
    assert "| count | 100 | 99.0% | 85% | reached |" in markdown([goals_table(result)])
    draw_drift(rows, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_the_frontier_is_what_no_row_beats():
    rows = [made_up(f"{b} {v}", "peer", 4, b, v) for b, v in ((4.3, 3e-4), (8.2, 1e-5), (4.3, 5e-4), (5.0, 4e-4), (3.5, 1e-3))]
    assert [r.bits_matrices for r in frontier(rows)] == [3.5, 4.3, 8.2] and frontier(rows)[1].kld_mean.value == 3e-4


def test_mini_is_what_the_peers_are_asked_with(mini_bundle):
    """The fp16 build's tensors are what peers get: the checkpoint's own, in the shapes of its config."""
    tensors = Bundle.open(mini_bundle("fp16")).decoder_tensors()
    assert {n: t.shape for n, t in tensors.items()} == decoder_shapes(MINI_MAMBA)


@pytest.mark.parametrize("label", [DEFAULT, DEFAULT_ON_GPU])
def test_the_front_page_shows_the_default(label):
    """The rows that are told to be the default were exported without any option, and so would they be today."""
    build = next(b for b in BUILDS if b.label == label)
    row = next(r for r in quality_result().rows if r.label == label)
    target = target_named(build.target)
    chosen = choose(ExportOptions(), target)
    assert build.export == row.export == {} and label in HEADLINE
    assert (row.method, row.rotations) == (chosen.method, ROTATIONS[chosen.rotation])
    assert row.activations == activations_of(SCHEMES[target.scheme]) and 0.98 * target.bits < row.bits_matrices <= target.bits
