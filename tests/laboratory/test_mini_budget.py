"""`python -m bench.budgets` updates every section, or leaves the file unchanged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from bench import mini_budget
from bench.mini_budget import CALIBRATION_THREADS, GATES, HEADER, write_budget
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.report import Figure

from ..regress.regress_reports import make_report


@pytest.fixture
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(bundle: Path) -> SimpleNamespace:
        report = make_report()
        return SimpleNamespace(report=msgspec.structs.replace(report, build=_named(report.build, bundle.name)))

    monkeypatch.setattr(mini_budget, "export_gate", lambda gate, folder: folder / gate.scheme)
    monkeypatch.setattr(mini_budget, "measured", measured)


def _named(build: object, scheme: str) -> object:
    return msgspec.structs.replace(build, scheme=scheme)  # type: ignore[type-var]


def test_every_gate_gets_a_section_with_its_margin(measured_at_once: None, tmp_path: Path) -> None:
    file, told = tmp_path / "budget.toml", list[str]()
    file.write_text("[schemes.gone]\nkld_mean = { max = 1 }\n")
    write_budget(file, tmp_path, lambda scheme, done, total: told.append(f"{done} of {total}: {scheme}"))
    limits, high = read_budget(file).schemes, make_report().measures["kld_mean"].high
    assert file.read_text().startswith(HEADER)
    assert list(limits) == list(GATES) and told[1] == f"1 of {len(GATES)}: {list(GATES)[1]}"
    assert high is not None
    for scheme, gate in GATES.items():
        most = limits[scheme]["kld_mean"].max
        assert most is not None and high * (1 + gate.margin) <= most <= high * (1 + gate.margin) * 1.01


def test_the_file_stays_where_a_build_fails(measured_at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "budget.toml"
    file.write_text("as it was")

    def export_gate(gate: mini_budget.Gate, folder: Path) -> Path:
        if gate.scheme == "mixed":
            raise KeyboardInterrupt
        return folder / gate.scheme

    monkeypatch.setattr(mini_budget, "export_gate", export_gate)
    with pytest.raises(KeyboardInterrupt):
        write_budget(file, tmp_path, lambda scheme, done, total: None)
    assert [f.name for f in tmp_path.iterdir()] == ["budget.toml"] and file.read_text() == "as it was"


def test_limits_of_calibrated_builds_are_of_the_furthest_on_either_side() -> None:
    one = {"kld_mean": Figure(2.0, 1.0, 3.0), "perplexity_ratio": Figure(0.98, 0.96, 1.0), "top1_agreement": Figure(None)}
    other = {"kld_mean": Figure(4.0, 2.0, 6.0), "perplexity_ratio": Figure(1.0, 0.99, 1.01), "top1_agreement": Figure(None)}
    worst = mini_budget._worst([one, other])
    assert worst["kld_mean"].high == 6.0 and worst["top1_agreement"] == Figure(None)
    assert worst["perplexity_ratio"].high == pytest.approx(1.04)


def test_a_build_is_calibrated_by_its_number_of_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen, before = list[int](), torch.get_num_threads()
    monkeypatch.setattr(mini_budget, "export_gate", lambda gate, folder: seen.append(torch.get_num_threads()))
    for threads in GATES["mixed"].threads:
        mini_budget._export_by(threads, GATES["mixed"], tmp_path)
    assert seen == list(CALIBRATION_THREADS) and torch.get_num_threads() == before
