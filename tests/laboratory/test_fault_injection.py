"""Injected faults are caught by the command: with exit code 1, and by the expected measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from bench.fault_kinds import quantized
from bench.fault_result import FaultResult, FaultRow, faults_table
from bench.fault_trials import FAULTS, inject
from bench.mini_budget import BUDGET, GATES
from cobra_edge.bench.tables import markdown
from cobra_edge.bundle.reader import Bundle
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.measures import measure_named
from cobra_edge.regress.report import Report, read_report
from cobra_edge.regress.run_command import regress
from cobra_edge.terminal.output import run_command

from ..machine_case import MACHINE

LINES = 100  # whose intervals are wider than those the limits were made with: what fails here fails on all lines


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults") / "w4a16-g128"
    return export_bundle(
        "mini", target_named("cpu"), out, scheme="w4a16-g128", method="rtn", vision_precision="fp32", golden_lines=LINES
    ).directory


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Callable[[str | None, Path | None], tuple[int, Report | None]]:
    """Return a function that injects a fault (or none) into a good build and runs the command on it."""

    def go(name: str | None, budget: Path | None = BUDGET) -> tuple[int, Report | None]:
        bundle, report = good, tmp_path / "report"
        arguments = ["--report", str(report), "--attribution-lines", "0", "--threads", "1"]
        arguments += [] if budget is None else ["--budget", str(budget)]
        if name is None:
            code = run_command(regress, [str(bundle), *arguments])
        else:
            bundle = tmp_path / "broken"
            inject(FAULTS[name], good, bundle)
            with FAULTS[name].running():
                code = run_command(regress, [str(bundle), *arguments])
        file = report / "report.json"
        return code, read_report(file) if file.is_file() else None

    return go


@pytest.fixture(scope="module")
def own_budget(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Limits made of the good build as `make budgets` makes them."""
    file = tmp_path_factory.mktemp("budget") / "budget.toml"
    margin = str(GATES["w4a16-g128"].margin)
    arguments = [str(good), "--update-budget", "--budget", str(file), "--margin", margin, "--attribution-lines", "0"]
    assert run_command(regress, [*arguments, "--threads", "1"]) == 0
    return file


def test_the_good_build_is_within_its_budget(run: Callable[..., tuple[int, Report | None]], own_budget: Path) -> None:
    code, report = run(None, own_budget)
    assert code == 0 and report is not None and report.passed


# What the harness promises comes first: a doubled scale, a layer at 2 bits, images normalised wrongly.
@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("one scale, x_proj, w4a16-g128", "kld_change"),
        ("2 bits, of 4", "state_error.1"),
        ("2 bits, of 4", "kld_mean"),
        ("normalisation", "vision_error"),
        ("red and blue", "vision_error"),
        ("projector's bias", "vision_error"),
        ("nibbles", "state_error.1"),
        ("stale convolution", "greedy_match"),
        ("image forgotten", "kld_mean"),
    ],
)
def test_a_fault_is_caught_by_the_right_measure(
    name: str, measure: str, run: Callable[..., tuple[int, Report | None]], own_budget: Path
) -> None:
    code, report = run(name, own_budget)
    assert report is not None
    failed = {v.measure for v in report.verdicts if not v.within}
    assert code == 1 and not report.passed
    assert measure in failed
    if name in ("red and blue", "normalisation", "projector's bias"):
        assert len(failed) > 1  # what is seen wrongly is answered wrongly
    if name == "stale convolution":
        assert failed <= {
            "greedy_match",
            "accuracy",
            "accuracy_change",
            "reply_change",
        }  # nothing that reads many tokens at once shows it


def test_answers_that_are_not_finite_are_a_drift(run: Callable[..., tuple[int, Report | None]]) -> None:
    assert run("infinite scale") == (1, None)


def test_another_prompt_template_is_refused(run: Callable[..., tuple[int, Report | None]]) -> None:
    assert run("prompt style") == (2, None)


def test_a_fault_changes_what_it_says_and_nothing_else(good: Path, tmp_path: Path) -> None:
    fault = FAULTS["one scale, in_proj, w4a16-g128"]
    inject(fault, good, tmp_path / "broken", 3)
    right, wrong = (Bundle.open(d, thorough=True).decoder_tensors() for d in (good, tmp_path / "broken"))
    name = "backbone.layers.1.mixer.in_proj.weight"
    ratio = quantized(wrong, name).scales / quantized(right, name).scales
    assert sorted(ratio.ravel().tolist())[-2:] == [1.0, 2.0] and ratio.min() == 1
    assert np.array_equal(quantized(wrong, name).codes, quantized(right, name).codes)
    for other in right.keys() - {name}:
        a, b = (np.asarray(t[other].codes if hasattr(t[other], "codes") else t[other]) for t in (right, wrong))
        assert np.array_equal(a, b), other


def test_the_table_is_sound() -> None:
    assert all(name == fault.name and fault.gate in GATES and fault.draws >= 1 for name, fault in FAULTS.items())
    for fault in FAULTS.values():
        assert fault.on_disk is not None or fault.running().__class__.__name__ != "nullcontext", fault.name
        for measure in fault.expected:
            measure_named(measure)


def test_a_row_of_the_page_says_what_was_caught_and_what_was_not() -> None:
    row = {
        "name": "x", "description": "something", "build": "w4a16-g128", "draws": 6, "caught": 4, "caught_by_shipped": 1,
        "expected": ["kld_mean"], "expected_failed": 3, "exit_codes": [1, 1, 1, 1, 0, 0],
        "failed": {"kld_mean": 3, "kld_p99": 4}, "worst": "kld_p99", "worst_times": 2.5, "refused": "",
        "gates": {"absolute": 1},
    }  # fmt: skip

    def shown(row: dict[str, Any]) -> str:
        rows = (msgspec.convert(row, FaultRow),)
        return markdown([faults_table(FaultResult(model="cobra-mini", rows=rows, machine=MACHINE))])

    table = shown(row)
    assert "| something | `w4a16-g128` | 1 of 6 | 1 | – | – | 4 of 6 | `kld_p99`, 2.5 times |" in table
    refused = row | {"refused": "does not fit", "worst": None, "worst_times": None, "draws": 1, "expected": []}
    assert "refused" in shown(refused)
