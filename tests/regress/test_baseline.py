"""Baselines: golden lines, a bundle and a checkpoint give the same measures of a build; another model is refused."""

import json
import shutil
import sys

import msgspec
import pytest

from cobra_edge.bundle.reader import GOLDEN, MANIFEST, TOKENIZER, Bundle, file_sha256
from cobra_edge.errors import InputError, MachineError
from cobra_edge.inference.session import Session
from cobra_edge.regress.baseline import open_baseline
from cobra_edge.regress.golden import read_golden
from cobra_edge.regress.runner import measure
from cobra_edge.suite.reader import HELDOUT, read_suite

from ..conftest import write_text_only
from .regress_lines import run_of, write_lines


@pytest.fixture(scope="module")
def reports(mini_bundle, tmp_path_factory):
    """Return a 4-bit build's report by baseline, of the same lines."""
    build = mini_bundle("w4a16-g128")
    lines = [tokenized.line for tokenized in read_golden(Bundle.open(build)).suite.lines]
    suite = write_lines(tmp_path_factory.mktemp("same"), lines)
    baselines = {"golden": "fp16", "bundle": mini_bundle("fp16"), "checkpoint": "mini"}
    return {kind: measure(run_of(build, given, suite=suite), None, None, None).report for kind, given in baselines.items()}


@pytest.mark.parametrize("kind", ["golden", "bundle"])
def test_baselines_say_the_same(reports, kind):
    """The checkpoint is the truth; golden lines keep the likely part of it, an fp16 bundle rounds its weights."""
    near = {"golden": 1e-3, "bundle": 0.05}[kind]
    truth, found = reports["checkpoint"], reports[kind]
    assert truth.suite == found.suite and found.suite.lines == 48
    for name in ("kld_mean", "kld_p90", "right_change_rms", "state_error", "perplexity_ratio"):
        assert found.measures[name].value == pytest.approx(truth.measures[name].value, rel=near), name
    assert truth.measures["kld_mean"].value > 1e-5  # there is something to agree on
    for name in ("top1_agreement", "greedy_match", "accuracy", "accuracy_change", "length_ratio"):
        assert found.measures[name].value == pytest.approx(truth.measures[name].value, abs=0.035), name
    for layer, other in zip(found.layers, truth.layers, strict=True):
        assert layer.state_error.value == pytest.approx(other.state_error.value, rel=near)


def test_golden_lines_lack_no_more_than_they_say(reports):
    golden, truth = reports["golden"], reports["checkpoint"]
    for name, most in (("kld_mean", 1e-3), ("prompt_kld_mean", 0.5)):  # of a question's next word anybody is unsure
        truncated, whole = golden.measures[name].value, truth.measures[name].value
        assert whole * (1 - most) <= truncated <= whole + 1e-7
    assert 0 < golden.baseline.tail_mass_max < 1 and 8 <= golden.baseline.top_k <= 65
    assert truth.baseline.tail_mass_max == 0 and truth.baseline.top_k is None


def test_each_baseline_is_named(reports):
    assert {kind: (r.baseline.kind, r.baseline.computed_by) for kind, r in reports.items()} == {
        "golden": ("golden", "torch, float32, at export"),
        "bundle": ("bundle", f"{reports['golden'].runtime.decoder}, fp16; vision by {reports['golden'].runtime.vision}"),
        "checkpoint": ("checkpoint", "torch, float32"),
    }
    assert (reports["golden"].baseline.name, reports["checkpoint"].baseline.name) == ("fp16", "mini")


def test_a_bundle_against_itself_does_not_drift(mini_bundle, tmp_path):
    build = mini_bundle("w4a16-g128")
    suite = write_lines(tmp_path, read_suite(HELDOUT)[:12])
    measures = measure(run_of(build, build, suite=suite), None, None, None).report.measures
    assert {name: measures[name].value for name in ("kld_max", "state_error", "vision_error", "greedy_match")} == {
        "kld_max": 0, "state_error": 0, "vision_error": 0, "greedy_match": 1,
    }  # fmt: skip


def test_the_default_suite_is_what_the_baseline_can_answer(mini_bundle):
    build = mini_bundle("w4a16-g128")
    golden = measure(run_of(build, lines=8), None, None, None).report
    assert (golden.suite.name, golden.suite.lines, golden.baseline.kind) == ("the bundle's golden lines", 8, "golden")
    bundle = measure(run_of(build, build, lines=8), None, None, None).report
    assert (bundle.suite.name, bundle.suite.lines) == (HELDOUT.name, 8)


# --- refusals ---------------------------------------------------------------------------------------------------------------


def opened(bundle, wanted):
    return open_baseline(str(wanted), Bundle.open(bundle), lambda other: Session(other))


@pytest.fixture
def tiny_copy(tiny_bundle, tmp_path):
    """Return a copy of the tiny bundle, and a function that edits its manifest."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")

    def edit(change):
        data = json.loads((copy / MANIFEST).read_text())
        change(data)
        (copy / MANIFEST).write_text(json.dumps(data))

    return copy, edit


def test_a_bundle_of_another_checkpoint_is_refused(tiny_bundle, tiny_copy):
    copy, edit = tiny_copy
    assert opened(tiny_bundle, copy).kind == "bundle"
    edit(lambda m: m["source"].update(id="another", sha256="0" * 64))
    with pytest.raises(InputError, match=r"made from another \(000000000000\), this build from .* builds of one checkpoint"):
        opened(tiny_bundle, copy)


def test_a_bundle_of_another_model_is_refused(tiny_bundle, mini_bundle):
    with pytest.raises(InputError, match=r"made from cobra-mini .* only builds of one checkpoint can be compared"):
        opened(tiny_bundle, mini_bundle("w4a16-g128"))


def test_a_bundle_with_another_tokenizer_is_refused(tiny_bundle, tiny_copy):
    copy, edit = tiny_copy
    tokenizer = json.loads((copy / TOKENIZER).read_bytes())
    (copy / TOKENIZER).write_text(json.dumps(tokenizer, indent=7))
    entry = {"bytes": (copy / TOKENIZER).stat().st_size, "sha256": file_sha256(copy / TOKENIZER)}
    edit(lambda m: m["files"].update({TOKENIZER: entry}))
    with pytest.raises(InputError, match="its tokenizer differs; export both bundles with the same one"):
        opened(tiny_bundle, copy)


def test_a_checkpoint_of_other_weights_is_refused(tiny_bundle, tmp_path):
    other = write_text_only(tmp_path / "mamba-tiny", seed=1)
    with pytest.raises(InputError, match="is not the checkpoint of this build"):
        opened(tiny_bundle, other)
    assert opened(tiny_bundle, write_text_only(tmp_path / "same" / "mamba-tiny")).kind == "checkpoint"


def test_a_checkpoint_of_another_model_is_refused(tiny_bundle):
    with pytest.raises(InputError, match=r"cobra-mini .* is not the checkpoint of this build"):
        opened(tiny_bundle, "mini")


def test_what_is_no_baseline_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(InputError):
        opened(tiny_bundle, tmp_path)
    with pytest.raises(InputError):
        opened(tiny_bundle, "/nowhere")


def test_a_line_that_golden_lines_do_not_know_is_named(mini_bundle, tmp_path):
    build = mini_bundle("w4a16-g128")
    known = [tokenized.line for tokenized in read_golden(Bundle.open(build)).suite.lines]
    strange = next(line for line in read_suite(HELDOUT) if line not in known)
    suite = write_lines(tmp_path, [*known[:3], b"", strange])
    with pytest.raises(
        InputError, match=r"suite.jsonl, line 5: the golden lines of the bundle do not include it; give --baseline with"
    ):
        measure(run_of(build, suite=suite), None, None, None)


def test_a_known_question_about_another_image_is_not_known(mini_bundle, tmp_path):
    build = mini_bundle("w4a16-g128")
    first, *others = [tokenized.line for tokenized in read_golden(Bundle.open(build)).suite.lines]
    other = next(line.image for line in others if line.image not in (first.image, others[0].image))
    suite = write_lines(tmp_path, [others[0], msgspec.structs.replace(first, image=other)])
    with pytest.raises(InputError, match=r"line 2: the golden lines of the bundle do not include it"):
        measure(run_of(build, suite=suite), None, None, None)


def test_without_torch_a_checkpoint_is_no_baseline(tiny_bundle, monkeypatch):
    monkeypatch.delitem(sys.modules, "cobra_edge.regress.float_reference", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MachineError, match=r"--baseline mini: a checkpoint needs torch; .*'\.\[export\]'.*--baseline fp16"):
        opened(tiny_bundle, "mini")


def test_golden_lines_of_a_bundle_are_hashed_with_it(tiny_bundle):
    found = opened(tiny_bundle, "fp16")
    assert found.fingerprint == Bundle.open(tiny_bundle).manifest.files[GOLDEN].sha256 and len(found.golden.predictions) == 16
