"""`python -m bench.closed_sets`: which tasks, calibration, and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import closed_sets as module
from bench.closed_sets import (
    ClosedSetsResult,
    Task,
    closed_sets,
    closed_sets_table,
    closed_tasks,
    reliability,
    reliability_table,
)
from cobra_edge.suite.line import Line
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.terminal.output import run_command

from ..machine_case import MACHINE


def test_tasks_of_few_answers_by_image() -> None:
    answers, lines = closed_tasks(read_suite(HELDOUT), 7)
    assert answers["existence"] == ["No", "Yes"] and "caption" not in answers
    assert len(lines) == 7 * len(answers) and [str(x.image) for x in lines] == sorted(str(x.image) for x in lines)
    many = [Line("?", str(n), "many", None) for n in range(17)]
    assert closed_tasks(many, None) == ({}, [])


def test_calibration_error() -> None:
    bins, error = reliability([0.95, 0.95, 0.55, 1.0], [True, False, True, True])
    assert [(b.low, b.lines, b.right) for b in bins] == [(0.5, 1, 1), (0.9, 3, 2)]
    assert error == pytest.approx((abs(0.55 - 1) + abs(0.95 + 0.95 + 1.0 - 2)) / 4)
    assert reliability([1.0, 1.0], [True, True])[1] == 0


def test_tables() -> None:
    task = Task(task="count", choices=6, lines=8, chosen=7, chosen_by_length=6, generated=5, choose_ms=3.21, generate_ms=2.0)
    bins, error = reliability([0.95, 0.55], [True, False])
    result = ClosedSetsResult(
        model="m", scheme="s", decoder="native", tasks=(task,), bins=bins, calibration_error=error, sure=1, sure_right=1,
        machine=MACHINE,
    )  # fmt: skip
    assert closed_sets_table(result).rows == [["count", "6", "8", "87.5%", "75.0%", "62.5%", "3.2", "2.0"]]
    assert reliability_table(result).rows == [["0.5–0.6", "1", "55.0%", "0.0%"], ["0.9–1.0", "1", "95.0%", "100.0%"]]
    assert "1 of 2 questions are answered, 100.0% of them right" in reliability_table(result).notes[0]


def test_a_bundle_is_measured(mini_bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(module, "save_result", lambda name, result: tmp_path / f"{name}.json")
    assert run_command(closed_sets, [str(mini_bundle("w4a16-g128")), "--lines", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [t["task"] for t in result["tasks"]] == ["existence", "spatial", "attribute", "count"]
    assert (
        all(t["lines"] == 4 and t["choose_ms"] > 0 for t in result["tasks"]) and sum(b["lines"] for b in result["bins"]) == 16
    )
    assert sum(t["chosen"] for t in result["tasks"]) >= 12
