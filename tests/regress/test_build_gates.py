"""The gates of `regress`: what each judges, what it says where it cannot, and the faults that absolute limits let pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.fault_kinds import all_scales, change_tensors, seal
from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.manifest import Drift
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.errors import BundleError
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.command import command
from cobra_edge.regress.drift import judged_drift
from cobra_edge.regress.expected import expected_gate
from cobra_edge.regress.gates import GATES, gate_limits, gate_of
from cobra_edge.regress.outputs.rows import gate_rows
from cobra_edge.regress.recorded import COLUMNS, OTHER, SAME
from cobra_edge.regress.report import Report, read_report
from cobra_edge.regress.runner import Run, measure
from cobra_edge.terminal.output import run_command

LINES = 100  # of few lines the interval is too wide for a good build
_LAYER_1 = "backbone.layers.1.mixer."


@pytest.fixture(scope="module")
def good(mini_bundle: Callable[..., Path]) -> Path:
    return mini_bundle("w4a16-g128", golden_lines=LINES)


def report_of(bundle: Path, *, budget: Path | None = None, against: Path | None = None, **options: Any) -> Report:
    """Measure a bundle on its golden lines and judge it as the command does without a flag."""
    kernels = options.pop("kernels", "auto")
    run = Run(bundle, "fp16", None, None, False, "cpu", kernels, "auto", DecoderOptions(1, **options), 0, None, against)
    return measure(run, read_budget(budget), "default.toml", None).report


def changed(good: Path, into: Path, *, drift: dict[str, Any] | None = None) -> Path:
    """Copy a bundle, with other values in the drift of its manifest."""
    shutil.copytree(good, into)
    before = Bundle.open(into).manifest.drift
    assert before is not None
    seal(into, drift=msgspec.structs.replace(before, **(drift or {})))
    return into


def with_scales(good: Path, into: Path, kind: str, times: float) -> Path:
    shutil.copytree(good, into)
    change = all_scales(f"{_LAYER_1}{kind}.weight", times)
    change_tensors(into, change(Bundle.open(into).decoder_tensors(), np.random.default_rng(0)))
    return into


def failed(report: Report) -> set[str]:
    return {gate_of(verdict) for verdict in report.verdicts if not verdict.within}


# --- recorded ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "numpy", "torch"])
def test_a_good_build_drifts_as_recorded(good: Path, kernels: str) -> None:
    report = report_of(good, kernels=kernels)
    assert report.passed and set(report.not_judged) == {"against", "expected"}
    assert {v.measure for v in report.verdicts if gate_of(v) == "recorded"} == {
        "kld_change",
        "prompt_kld_change",
        "reply_change",
    }


@pytest.mark.parametrize(("kind", "times"), [("out_proj", 2.0), ("x_proj", 1.1)])
def test_scales_that_absolute_limits_let_pass(good: Path, tmp_path: Path, kind: str, times: float) -> None:
    broken = with_scales(good, tmp_path / "broken", kind, times)
    report = report_of(broken)
    assert failed(report) == {"recorded"}
    words = dict(gate_rows(report))
    assert words["absolute"].startswith("held") and words["recorded"].startswith("FAILED, ")
    assert run_command(command, [str(broken), "--threads", "1", "--attribution-lines", "0"]) == 1


def test_an_earlier_bundle_is_judged_by_its_budget_alone(good: Path, tmp_path: Path) -> None:
    report = report_of(changed(good, tmp_path / "old", drift={"by_line": {}, "activations": ""}))
    assert report.passed and "records no drift by line" in report.not_judged["recorded"]
    assert {gate_of(v) for v in report.verdicts} == {"absolute"}


def test_other_activations_are_not_compared(good: Path) -> None:
    report = report_of(good, activations="int8")
    assert report.not_judged["recorded"] == "the drift was recorded with float32 activations, this decoder has int8"


@pytest.mark.parametrize("by_line", [{name: (1.0,) for name in COLUMNS}, {"kld": (0.0,) * LINES}])
def test_a_record_of_other_lines_is_not_compared(good: Path, tmp_path: Path, by_line: dict[str, tuple[float, ...]]) -> None:
    report = report_of(changed(good, tmp_path / "odd", drift={"by_line": by_line}))
    assert f"is not of the {LINES} golden lines" in report.not_judged["recorded"]


def test_a_part_of_the_lines_is_compared_with_the_same_lines(good: Path) -> None:
    run = Run(good, "fp16", None, 9, False, "cpu", "auto", "auto", DecoderOptions(1), 0, None)
    report = measure(run, read_budget(), "default.toml", None).report
    change = report.measures["kld_change"].value
    assert report.suite.lines == 9 and "recorded" not in failed(report) and change is not None and change < 0.05


def test_there_are_limits_for_each_kind_of_activations() -> None:
    limits = gate_limits()
    assert set(limits.recorded) == {SAME, OTHER} and set(limits.expected) == {"kld_over_expected"}
    for by_activations in limits.recorded.values():
        assert set(by_activations) == {"float32", "int8"}
        assert all(set(of) == {"kld_change", "prompt_kld_change", "reply_change"} for of in by_activations.values())


def test_the_runtime_of_the_export_has_the_tighter_limits(good: Path, tmp_path: Path) -> None:
    """The graph of a Jetson's bundle is of fp16, which a processor runs otherwise than the export emulated it."""
    report = report_of(good)
    wide, tight = (gate_limits().recorded[kind]["float32"]["kld_change"].max for kind in (OTHER, SAME))
    assert [v.limit for v in report.verdicts if v.measure == "kld_change"] == [wide]
    assert report.runtime.vision is not None and tight is not None and wide is not None and tight < wide
    report = report_of(changed(good, tmp_path / "same", drift={"vision_runtime": report.runtime.vision}))
    assert [v.limit for v in report.verdicts if v.measure == "kld_change"] == [tight] and failed(report) == {"recorded"}


# --- against ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a report of the good build."""
    directory: Path = tmp_path_factory.mktemp("against") / "report"
    assert run_command(command, [str(good), "--threads", "1", "--attribution-lines", "0", "--report", str(directory)]) == 0
    return directory


def test_a_build_is_not_worse_than_itself(good: Path, reported: Path) -> None:
    for other in (reported, reported / "report.json", good):
        report = report_of(good, against=other)
        assert report.passed and "against" not in report.not_judged
        assert report.measures["kld_ratio"].value == pytest.approx(1, rel=0.01)


def test_a_worse_build_fails_and_a_better_one_does_not(
    good: Path, reported: Path, mini_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    worse = report_of(with_scales(good, tmp_path / "worse", "x_proj", 1.1), against=reported)
    assert {"recorded", "against"} == failed(worse)
    better = report_of(mini_bundle("w8a16-g128", golden_lines=LINES), against=good)
    ratio = better.measures["kld_ratio"]
    assert "against" not in failed(better) and ratio.value is not None and ratio.value < 0.1


def test_what_cannot_be_compared_is_refused_before_measuring(
    good: Path, reported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], mini_bundle: Callable[..., Path]
) -> None:
    def refused(other: Path, *more: str) -> str:
        capfd.readouterr()
        assert run_command(command, [str(good), "--threads", "1", "--against", str(other), *more]) == 2
        err = " ".join(capfd.readouterr().err.split())
        assert "lines 1" not in err
        return err

    def copy(name: str, **changes: Any) -> Path:
        shutil.copytree(reported, tmp_path / name)
        data = json.loads((reported / "report.json").read_text())
        for key, value in changes.items():
            part, _, field = key.partition("__")
            if field:
                data[part][field] = value
            else:
                data[part] = value
        (tmp_path / name / "report.json").write_text(json.dumps(data))
        return tmp_path / name

    assert "it is of cobra+9b, this build of" in refused(copy("model", build__model="cobra+9b"))
    assert "schema_version is 1" in refused(copy("schema", schema_version=1))
    assert "compared with a checkpoint baseline" in refused(copy("baseline", baseline__kind="checkpoint"))
    assert "of another suite" in refused(reported, "--lines", "9")
    cut = copy("cut")
    (cut / "lines.jsonl").write_bytes(b"".join((cut / "lines.jsonl").read_bytes().splitlines(keepends=True)[:-1]))
    assert f"{LINES - 1} lines, the report {LINES}" in refused(cut)
    (cut / "lines.jsonl").write_text("{}\n")
    assert "expected the lines.jsonl of a finished" in refused(cut)
    assert "cannot be read" in refused(tmp_path / "nowhere")
    assert "records no drift by line" in refused(changed(good, tmp_path / "old", drift={"by_line": {}}))
    fewer = mini_bundle("w8a16-g128")
    assert "its golden lines do not include line" in refused(fewer)


# --- expected ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (0.01, False), (1000.0, False)])
def test_a_drift_far_from_the_foretold_one_fails(good: Path, tmp_path: Path, times: float, passes: bool) -> None:
    """`times`: the expectation over the drift that the good build has."""
    drift = Bundle.open(good).manifest.drift
    assert isinstance(drift, Drift)
    report = report_of(changed(good, tmp_path / "b", drift={"expected_kld": times * drift.measures["kld_mean"]}))
    assert report.passed is passes and failed(report) == (set() if passes else {"expected"})


def test_where_rounding_is_all_there_is_nothing_is_far_from_the_foretold() -> None:
    drift = Drift("native", None, 1, 1, {}, expected_kld=1e-8)
    gate = expected_gate(drift, 3e-6, 16, {"bf16": {"kld_mean": 1e-4}}, gate_limits().expected)
    assert [verdict.within for verdict in gate.verdicts] == [True, True]
    few = expected_gate(drift, 3e-6, 15, {"bf16": {"kld_mean": 1e-4}}, gate_limits().expected)
    assert (few.why_not, few.verdicts) == ("too few to judge (15 images; 16 needed)", ())
    assert "no noise floor" in expected_gate(drift, 3e-6, 16, {}, gate_limits().expected).why_not


@pytest.mark.parametrize("drift", [{"by_line": {"kld": (-1.0,)}}, {"expected_kld": -1e-5}])
def test_a_divergence_below_zero_is_no_record(good: Path, tmp_path: Path, drift: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        report_of(changed(good, tmp_path / "odd", drift=drift))


# --- the verdict of an export -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines", [48, 8])
def test_an_export_judges_as_a_regression_run_does(mini_bundle: Callable[..., Path], tmp_path: Path, lines: int) -> None:
    """48 lines are about enough images for every interval, 8 leave quantiles unjudged."""
    given = {"vision_precision": "fp32", "budget": budget_without_limits(tmp_path)}
    bundle = mini_bundle("w8a16-g128", golden_lines=lines, **given)
    manifest, report = Bundle.open(bundle).manifest, report_of(bundle)
    assert manifest.drift is not None and manifest.vision is not None
    limits = read_budget().limits_of(manifest.recipe.scheme, manifest.vision.precision, manifest.target)
    found = judged_drift(manifest.drift, limits, manifest.noise_floor)
    theirs = [verdict for verdict in report.verdicts if gate_of(verdict) == "absolute"]
    assert [(v.measure, v.rule, v.within, v.note) for v in found] == [(v.measure, v.rule, v.within, v.note) for v in theirs]
    for ours, their in zip(found, theirs, strict=True):
        assert (ours.judged is None) == (their.judged is None) == (lines == 8 and ours.measure == "kld_p99")
        assert ours.judged is None or ours.judged == pytest.approx(their.judged, rel=0.2)


# --- all --------------------------------------------------------------------------------------------------------------------


def test_a_run_that_judges_nothing_names_every_gate_too(good: Path) -> None:
    run = Run(good, "fp16", None, None, False, "cpu", "auto", "auto", DecoderOptions(1), 0, None)
    report = measure(run, None, None, None).report
    assert set(report.not_judged) == set(GATES) and not report.verdicts and report.measures["kld_change"].value is not None


def test_every_output_names_every_gate(reported: Path) -> None:
    report = read_report(reported / "report.json")
    assert [name for name, _ in gate_rows(report)] == list(GATES)
    for file in ("report.md", "report.html"):
        text = (reported / file).read_text(encoding="utf-8")
        assert all(name in text and words.split(":")[0] in text for name, words in gate_rows(report)), file
    xml = (reported / "junit.xml").read_text(encoding="utf-8")
    assert "gate against" in xml and "kld_change max" in xml
