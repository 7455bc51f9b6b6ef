"""Every build that ships is within its own drift budget: exported as an engineer would, and judged by the command."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bench.mini_budget import BUDGET, CALIBRATED, CONTINUOUS, GATES, HEADER, ROUNDED, export_gate
from cobra_edge.bundle.reader import GOLDEN, IMAGE, VISION
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.report import read_report
from cobra_edge.regress.run_command import regress
from cobra_edge.regress.update_budget import LIMITED
from cobra_edge.terminal.output import run_command


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, sharing: Callable[[], AbstractContextManager[None]]
) -> Iterator[Callable[[str], Path]]:
    root = tmp_path_factory.mktemp("gates")
    with sharing():
        yield lambda scheme: export_gate(GATES[scheme], root)


def test_there_is_a_gate_for_every_scheme_that_ships() -> None:
    assert set(GATES) == {*SCHEMES, "mixed"} == set(read_budget(BUDGET).schemes)


def test_the_budget_says_how_it_was_made() -> None:
    assert BUDGET.read_text(encoding="utf-8").startswith(HEADER)


@pytest.mark.parametrize("scheme", GATES)
def test_every_section_limits_drift_answers_state_and_sight(scheme: str) -> None:
    limits = read_budget(BUDGET).limits_of(scheme, "fp32", "cpu")
    assert set(limits) == {*LIMITED, *(f"state_error.{layer}" for layer in range(4))}


def test_margins_are_wide_only_where_a_last_bit_can_become_a_code() -> None:
    margins = dict.fromkeys(SCHEMES, CONTINUOUS) | dict.fromkeys(("w8a8", "w4a8", "bnb-int8"), ROUNDED) | {"mixed": CALIBRATED}
    assert {scheme: gate.margin for scheme, gate in GATES.items()} == margins


@pytest.mark.parametrize("scheme", GATES)
def test_a_build_is_within_its_budget(scheme: str, exported: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = exported(scheme)
    arguments = [str(bundle), "--budget", str(BUDGET), "--report", str(tmp_path), "--attribution-lines", "0", "--threads", "1"]
    code = run_command(regress, arguments)
    report = read_report(tmp_path / "report.json")
    assert [v for v in report.verdicts if not v.within] == []
    assert code == 0 and report.passed and len(report.verdicts) >= len(LIMITED)
    shutil.rmtree(bundle)


def test_what_exports_share_does_not_depend_on_the_scheme(tmp_path: Path) -> None:
    made = [
        export_bundle(
            "mini",
            target_named("cpu"),
            tmp_path / scheme,
            scheme=scheme,
            method="rtn",
            vision_precision="fp32",
            golden_lines=16,
        )
        for scheme in ("w8a16-channel", "w3a16-g64")
    ]
    one, other = ({name: m.manifest.files[name] for name in (VISION, IMAGE, GOLDEN)} for m in made)
    assert one == other and made[0].manifest.noise_floor == made[1].manifest.noise_floor
