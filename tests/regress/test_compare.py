"""Comparison of two reports: better, worse, and the interval of the difference."""

from __future__ import annotations

import io
import json
import sys

import msgspec
import numpy as np
import pytest
from rich.console import Console

from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError
from cobra_edge.regress import report as r
from cobra_edge.regress.outputs.compare import compare, difference
from cobra_edge.regress.outputs.compare_command import compare as command
from cobra_edge.regress.outputs.compare_command import comparison_tables
from cobra_edge.regress.outputs.html import comparison_html
from cobra_edge.regress.outputs.write import report_json
from cobra_edge.terminal.output import run_command

from .regress_reports import HOSTILE, bare_report, figure, hostile_report, make_report


def with_measures(**figures):
    return make_report(measures={**make_report().measures, **figures})


def word(name, before, after):
    before, after = (make_report(measures={name: figure}, tasks=(), layers=()) for figure in (before, after))
    found = compare(before, after)
    (change,) = found.changes
    assert change.measure == name
    return change.word


def test_a_report_is_like_itself():
    found = compare(make_report(), make_report())
    assert {change.word for change in found.changes} == {"alike"}
    report = make_report()
    assert len(found.changes) == len(report.measures) + 2 * len(report.tasks) + len(report.layers)
    assert not found.differs and not found.warnings and not found.worse and not found.better


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("kld_mean", (0.010, 0.009, 0.011), (0.020, 0.018, 0.022), "worse"),
        ("kld_mean", (0.020, 0.018, 0.022), (0.010, 0.009, 0.011), "better"),
        ("kld_mean", (0.010, 0.005, 0.015), (0.012, 0.007, 0.017), "alike"),
        # The intervals overlap, and the difference is still beyond both errors together: 4 > √(3² + 2²).
        ("kld_mean", (0.010, 0.008, 0.012), (0.014, 0.011, 0.017), "worse"),
        ("top1_agreement", (0.99, 0.98, 0.995), (0.90, 0.88, 0.92), "worse"),
        ("top1_agreement", (0.90, 0.88, 0.92), (0.99, 0.98, 0.995), "better"),
        ("length_ratio", (1.00, 0.99, 1.01), (1.20, 1.15, 1.25), "worse"),
        ("length_ratio", (1.00, 0.99, 1.01), (0.80, 0.75, 0.85), "worse"),
        ("length_ratio", (0.80, 0.75, 0.85), (1.10, 1.08, 1.12), "better"),
        ("length_ratio", (0.90, 0.88, 0.92), (1.10, 1.08, 1.12), "alike"),
        ("kld_max", (1.0, None, None), (2.0, None, None), "unsure"),
        ("kld_max", (1.0, None, None), (1.0, None, None), "alike"),
        ("kld_mean", (0.01, 0.009, 0.011), (None, None, None), "lost"),
        ("kld_mean", (None, None, None), (0.01, 0.009, 0.011), "new"),
        ("kld_mean", (None, None, None), (None, None, None), "not measured"),
        ("greedy_match", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), "alike"),
        ("greedy_match", (1.0, 1.0, 1.0), (1 - 1e-13, 1 - 1e-13, 1 - 1e-13), "alike"),
        ("greedy_match", (1.0, 1.0, 1.0), (0.9, 0.8, 0.95), "worse"),
        ("kld_max", (1.0, 1.0, 1.0), (1.1, 1.1, 1.1), "unsure"),
    ],
)
def test_words(name, before, after, expected):
    assert word(name, r.Figure(*before), r.Figure(*after)) == expected


def test_the_interval_of_a_difference_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered, runs, wide = 0, 4000, 1.96
    for _ in range(runs):
        a, b = rng.normal(1, 0.1), rng.normal(1.5, 0.3)
        found = difference(r.Figure(a, a - wide * 0.1, a + wide * 0.1), r.Figure(b, b - wide * 0.3, b + wide * 0.3))
        covered += found.low <= 0.5 <= found.high
    assert abs(covered / runs - 0.95) < 0.012


def test_a_difference_takes_the_ends_that_face_each_other():
    found = difference(r.Figure(1.0, 0.9, 1.3), r.Figure(2.0, 1.6, 2.1))
    assert found.value == 1.0 and found.low == pytest.approx(0.5) and found.high == pytest.approx(1 + 0.02**0.5)


def test_a_measure_that_is_lost_counts_as_worse():
    found = compare(make_report(), bare_report())
    assert {"kld_mean", "top1_agreement"} <= set(found.worse)


def test_ratios_to_a_third_build_are_not_compared():
    report = make_report(measures={**make_report().measures, "kld_ratio": figure(1.5)})
    names = {change.measure for change in compare(report, make_report()).changes}
    assert "kld_ratio" not in names and "kld_mean" in names


def test_tasks_are_compared_by_name():
    tasks = tuple(msgspec.structs.replace(t, score=figure(0.2)) if t.task == "color" else t for t in make_report().tasks)
    found = compare(make_report(), make_report(tasks=tasks))
    assert found.worse == ["accuracy.color"]


def test_what_differs_is_named_and_warned_of():
    full = make_report()
    other = make_report(
        commit=None,
        build=msgspec.structs.replace(full.build, scheme="w8a16", rotations=(), source_sha256="c" * 64),
        suite=msgspec.structs.replace(full.suite, sha256="d" * 64, skipped={}),
        baseline=msgspec.structs.replace(full.baseline, top_k=None),
    )
    found = compare(full, other)
    assert found.differs["build.scheme"] == ("w4a16-g128", "w8a16")
    assert found.differs["build.rotations"] == ("residual", "none")
    assert found.differs["suite.skipped"] == ("2 lines", "0 lines")
    assert found.differs["baseline.top_k"] == ("64", "none")
    assert found.differs["commit"] == (full.commit, "none")
    assert [text.split(":")[0] for text in found.warnings] == [
        "the checkpoints differ, so the figures are not directly comparable",
        "the suites differ, so the figures are not directly comparable",
        "the baselines differ, so the figures are not directly comparable",
    ]


def test_different_models_are_refused():
    other = make_report(build=msgspec.structs.replace(make_report().build, model="cobra-3b"))
    with pytest.raises(
        InputError, match="reports of cobra-mini and cobra-3b cannot be compared; give two reports of one model"
    ):
        compare(make_report(), other)


def test_the_page_of_a_comparison_is_inert():
    page = comparison_html(compare(hostile_report(), hostile_report()))
    assert "<script" not in page and "default-src 'none'" in page and "alert(1)&lt;/script&gt;" in page


# the command


@pytest.fixture
def reports(tmp_path):
    """Three directories: a report, one that is worse, one of another model."""
    full = make_report()
    kinds = {
        "a": full,
        "worse": with_measures(kld_mean=figure(0.05)),
        "other": make_report(build=msgspec.structs.replace(full.build, model=HOSTILE)),
    }
    for name, report in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_bytes(report_json(report))
    return tmp_path


def run(*arguments):
    return run_command(command, [str(argument) for argument in arguments])


def test_command_prints_a_table(reports, capfd):
    assert run(reports / "a", reports / "worse" / "report.json") == 0
    said = capfd.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "worse: 1 measures, better: 0"
    assert lines[4].split()[:2] == ["kld_mean", "worse"] and "+0.0377" in lines[4]
    assert "more measures: --all" in said
    assert run(reports / "a", reports / "worse", "--all") == 0
    assert "more measures" not in capfd.readouterr().out


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_breaks_no_word_and_no_number(width):
    build = msgspec.structs.replace(make_report().build, name="cobra-3b-jetson-orin-nano-best", fingerprint="e" * 64)
    after = make_report(
        build=build, measures={**make_report().measures, "right_change_mean": r.Figure(-5.12e-3, -6e-3, -4.4e-3)}
    )
    wide, narrow = io.StringIO(), io.StringIO()
    for table in comparison_tables(compare(make_report(), after), everything=True):
        Console(file=wide, width=400).print(table)
        Console(file=narrow, width=width).print(table)
    words = {word for word in wide.getvalue().split() if len(word) <= width - 4}
    assert words <= set(narrow.getvalue().split())
    assert max(map(len, narrow.getvalue().splitlines())) <= width


def test_command_prints_json(reports, capfd):
    assert run(reports / "a", reports / "worse", "--json") == 0
    changes = {change["measure"]: change for change in json.loads(capfd.readouterr().out)["changes"]}
    assert changes["kld_mean"]["word"] == "worse" and changes["kld_median"]["word"] == "alike"
    assert changes["kld_mean"]["difference"]["value"] == pytest.approx(0.0377)


def test_command_fails_on_what_is_worse_only_where_asked(reports, capfd):
    assert run(reports / "a", reports / "worse", "--fail-on-worse") == 1
    assert "worse than before: kld_mean" in capfd.readouterr().err
    assert run(reports / "worse", reports / "a", "--fail-on-worse") == 0
    assert run(reports / "a", reports / "a", "--fail-on-worse") == 0


def test_command_writes_a_page_even_where_it_fails(reports):
    page = reports / "page.html"
    assert run(reports / "a", reports / "worse", "--fail-on-worse", "--html", page) == 1
    assert "Worse measures: 1, better: 0" in page.read_text(encoding="utf-8")


def test_command_needs_jinja_for_a_page_alone(reports, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(reports / "a", reports / "worse") == 0
    assert run(reports / "a", reports / "worse", "--html", reports / "page.html") == 3
    assert install_hint("regress") in capfd.readouterr().err


def test_command_refuses_a_page_that_cannot_be_written(reports, capfd):
    assert run(reports / "a", reports / "worse", "--html", reports / "a" / "report.json" / "page.html") == 2
    assert "give another path" in capfd.readouterr().err


def test_command_refuses_what_is_no_report(reports, capfd):
    assert run(reports / "a", reports / "nothing") == 2
    assert "expected a report.json" in capfd.readouterr().err


def test_command_refuses_another_model_and_repeats_its_name_harmlessly(reports, capfd):
    assert run(reports / "a", reports / "other") == 2
    said = capfd.readouterr().err
    assert "cannot be compared" in said and "\x1b[31m" not in said and "\x00" not in said
