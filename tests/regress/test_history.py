"""Drift over commits: lines that are appended whole or not at all, and a plot of them."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import sys
import xml.etree.ElementTree

import filelock
import msgspec
import pytest
from PIL import Image
from rich.console import Console

from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.regress import report as r
from cobra_edge.regress.outputs import history as module
from cobra_edge.regress.outputs.history import append_history, entry_of, read_history
from cobra_edge.regress.outputs.history_command import _table
from cobra_edge.regress.outputs.history_command import history as command
from cobra_edge.regress.outputs.history_plot import plot_history
from cobra_edge.terminal.output import run_command

from .regress_reports import HOSTILE, bare_report, figure, held_report, hostile_report, make_report


def at(day: int, value: float | None = 0.01, scheme: str = "w4a16-g128", **changes) -> r.Report:
    """Return the report of a day in March."""
    full = held_report()
    return held_report(
        commit=f"{day:040x}",
        times=r.Times(f"2026-03-{day:02}T12:00:00Z", 1.0, 1.0),
        build=msgspec.structs.replace(full.build, name=f"mini-{scheme}", scheme=scheme),
        measures={**full.measures, "kld_mean": r.Figure(None) if value is None else figure(value)},
        **changes,
    )


@pytest.fixture
def file(tmp_path):
    """A history of two schemes over six commits; one run failed."""
    path = tmp_path / "drift.jsonl"
    for day in range(1, 7):
        append_history(path, at(day, 0.01 * day, **({"passed": False} if day == 5 else {})))
        append_history(path, at(day, 0.001 * day, scheme="w8a16"))
    return path


def texts_of(drawing):
    return {element.text for element in xml.etree.ElementTree.parse(drawing).iter() if element.tag.endswith("text")}


def test_what_is_appended_is_read(tmp_path):
    file = tmp_path / "deep" / "drift.jsonl"
    for report in (make_report(), bare_report(), hostile_report()):
        append_history(file, report)
    assert read_history(file) == [entry_of(report) for report in (make_report(), bare_report(), hostile_report())]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3


def test_an_entry_has_what_a_line_needs():
    entry, report = entry_of(make_report()), make_report()
    assert (entry.time, entry.commit, entry.build, entry.scheme) == (
        report.times.began,
        report.commit,
        report.build.name,
        "w4a16-g128",
    )
    assert (entry.decoder, entry.fingerprint, entry.model) == ("native, AVX2", "f" * 64, "cobra-mini")
    assert entry.measures["kld_mean"] == report.measures["kld_mean"] and "accuracy.color" in entry.measures
    assert entry.passed is False and entry_of(held_report()).passed is True and entry_of(bare_report()).passed is None


def append_many(file, count):
    for _ in range(count):
        append_history(file, make_report())


def test_processes_append_at_once_without_tearing_lines(tmp_path):
    file = tmp_path / "drift.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_many, args=(file, 10)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(read_history(file)) == 30


@pytest.mark.parametrize("torn", [lambda line: line[:-20], lambda line: line[:1], lambda line: bytes(30)])
def test_a_line_that_was_broken_off_is_removed_with_a_message(file, caplog, torn):
    *lines, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines) + torn(last))
    module.check_history(file)
    assert len(read_history(file)) == 11
    append_history(file, at(7))
    assert "the last line, 12, was truncated by a crash or a full disk; removed" in caplog.text
    assert file.read_bytes().startswith(b"".join(lines)) and len(read_history(file)) == 12


def test_the_first_line_may_be_broken_off(tmp_path):
    file = tmp_path / "drift.jsonl"
    append_history(file, at(7))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    module.check_history(file)
    append_history(file, at(7))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"my notes", b"my notes\nthat end here", b'{"history":'])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(InputError, match="line 1: "):
        module.check_history(file)
    append_history(file, at(7))  # by a program that did not ask first: nothing of it is removed
    assert file.read_bytes().startswith(content + b"\n")


def test_an_empty_file_is_a_history_without_entries(tmp_path):
    file = tmp_path / "drift.jsonl"
    file.touch()
    module.check_history(file)
    append_history(file, at(7))
    assert len(read_history(file)) == 1


@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_disk_without_room_is_named_and_the_file_stays_as_it_was(tmp_path, monkeypatch, step):
    file, whole = tmp_path / "drift.jsonl", getattr(os, step)

    def fail(descriptor, *content):
        whole(descriptor, *content)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, step, fail)
    with pytest.raises(MachineError, match="no room for .* free disk space"):
        append_history(file, at(7))
    assert file.read_bytes() == b""
    monkeypatch.undo()
    module.check_history(file)
    append_history(file, at(7))
    assert len(read_history(file)) == 1


def test_a_whole_line_that_lacks_its_end_gets_it(file):
    file.write_bytes(file.read_bytes()[:-1])
    append_history(file, at(7))
    assert len(read_history(file)) == 13


def test_a_full_disk_leaves_the_file_as_it_was(file, monkeypatch):
    before, write = file.read_bytes(), os.write
    monkeypatch.setattr(module.os, "write", lambda descriptor, content: write(descriptor, content[:50]))
    with pytest.raises(MachineError, match="no room for"):
        append_history(file, at(7))
    assert file.read_bytes() == before


def test_a_write_that_fails_teaches(file, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module.os, "write", fail)
    with pytest.raises(InputError, match="cannot be written .*give the history another path"):
        append_history(file, at(7))


def test_a_lock_that_another_holds_is_waited_for_and_then_named(file, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    with filelock.FileLock(f"{file}.lock"), pytest.raises(MachineError, match="another process has held"):
        append_history(file, at(7))


def test_a_history_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give the history another path"):
        append_history(tmp_path / "file" / "drift.jsonl", make_report())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}", "line 2: does not match the schema"),
        (b"not json", "line 2: not JSON"),
        (b"[" * 5000, "line 2: "),
        (b'"\xff"', "line 2: not UTF-8"),
        (msgspec.json.encode(make_report()), "line 2: does not match the schema"),
        (msgspec.json.encode(msgspec.structs.replace(entry_of(make_report()), history_version=9)), "history_version is 9"),
    ],
)
def test_lines_that_are_no_history_are_refused(tmp_path, line, reason):
    file = tmp_path / "drift.jsonl"
    append_history(file, make_report())
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=reason) as caught:
        read_history(file)
    assert "line 2" in str(caught.value)


def test_an_empty_or_missing_history_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a history \(JSON lines\)"):
        read_history(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="no entries"):
        read_history(tmp_path / "empty.jsonl")


def test_drawing_has_a_line_a_build_and_marks_failures(file, tmp_path):
    plot_history(read_history(file), tmp_path / "drift.svg")
    texts = texts_of(tmp_path / "drift.svg")
    assert {"mini-w4a16-g128 (w4a16-g128)", "mini-w8a16 (w8a16)", "budget exceeded", "kld_mean: KLD, mean (nats)"} <= texts
    assert "not measured" not in texts
    plot_history([entry_of(at(1)), entry_of(at(2))], tmp_path / "held.svg")
    assert "budget exceeded" not in texts_of(tmp_path / "held.svg")


def test_drawing_is_the_same_each_time(file, tmp_path):
    for kind in ("svg", "png"):
        plot_history(read_history(file), tmp_path / f"a.{kind}")
        plot_history(read_history(file), tmp_path / f"b.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 600


def test_divergence_is_drawn_on_a_logarithmic_scale_and_a_share_is_not(file, tmp_path):
    plot_history(read_history(file), tmp_path / "kld.svg")
    assert {"0.001", "0.01"} <= texts_of(tmp_path / "kld.svg")
    plot_history(read_history(file), tmp_path / "top1.svg", "top1_agreement")
    assert "top1_agreement: top-1 agreement (share of answer tokens)" in texts_of(tmp_path / "top1.svg")


def test_a_run_without_the_measure_is_marked(tmp_path):
    plot_history([entry_of(at(1)), entry_of(at(2, None)), entry_of(at(3, 0.0))], tmp_path / "drift.svg")
    assert "not measured" in texts_of(tmp_path / "drift.svg")


def test_suites_are_named_only_if_there_are_several(file, tmp_path):
    suite = msgspec.structs.replace(make_report().suite, sha256="e" * 64)
    plot_history([*read_history(file), entry_of(at(8, suite=suite))], tmp_path / "drift.svg")
    assert {"mini-w8a16 (w8a16), suite bbbbbbbb", "mini-w4a16-g128 (w4a16-g128), suite eeeeeeee"} <= texts_of(
        tmp_path / "drift.svg"
    )


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    plot_history([entry_of(hostile_report())], tmp_path / "drift.svg")
    assert any(
        text and text.startswith("<script>alert(1)</script> | [red]@octocat") for text in texts_of(tmp_path / "drift.svg")
    )


def test_drawings_that_cannot_be_are_refused(file, tmp_path):
    entries = read_history(file)
    with pytest.raises(InputError, match=r"plots end in \.svg, \.png, \.pdf"):
        plot_history(entries, tmp_path / "drift.gif")
    with pytest.raises(InputError, match="did you mean"):
        plot_history(entries, tmp_path / "drift.svg", "kld_meen")
    with pytest.raises(InputError, match=r"no entry has a value of accuracy\.nothing; available: .*kld_mean"):
        plot_history(entries, tmp_path / "drift.svg", "accuracy.nothing")
    with pytest.raises(InputError, match="give another path"):
        plot_history(entries, file / "drift.svg")
    assert not (tmp_path / "drift.svg").exists()


# the command


def run(*arguments):
    return run_command(command, [str(argument) for argument in arguments])


def test_command_draws_and_prints(file, tmp_path, capfd):
    assert run(file, "--out", tmp_path / "drift.svg", "--measure", "top1_agreement") == 0
    said = capfd.readouterr().out
    assert (
        said.startswith("top1_agreement: top-1 agreement (share of answer tokens), 12 runs")
        and "98.10%" in said
        and said.count("FAILED") == 1
    )
    assert (tmp_path / "drift.svg").exists()


def test_command_prints_json(file, capfd):
    assert run(file, "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["measure"] == "kld_mean" and len(printed["entries"]) == 12


def test_command_refuses(file, tmp_path, capfd):
    for arguments, expected in (
        ((tmp_path / "none.jsonl",), "expected a history (JSON lines)"),
        ((file, "--measure", "kld"), "unknown measure 'kld'"),
        ((file, "--out", tmp_path / "drift.txt"), "plots end in"),
    ):
        assert run(*arguments) == 2
        assert expected in capfd.readouterr().err


def test_command_needs_matplotlib_for_a_drawing_alone(file, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(file) == 0
    assert run(file, "--out", tmp_path / "drift.svg") == 3
    assert install_hint("regress") in capfd.readouterr().err


def test_command_shows_hostile_names_harmlessly(tmp_path, capfd):
    append_history(tmp_path / "drift.jsonl", hostile_report())
    assert run(tmp_path / "drift.jsonl") == 0
    said = capfd.readouterr().out
    assert HOSTILE not in said and "\x1b" not in said and "\x00" not in said and "<script>" in said


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_breaks_no_word_and_no_number(tmp_path, width):
    builds = ("cobra-3b-jetson-orin-nano-best", "cobra-3b-x86-cpu-w4a16-g128-gptq-residual")
    runs = [
        msgspec.structs.replace(entry_of(at(i)), build=builds[i % 2], commit=f"{i}123456789ab{i}" * 3, passed=i % 2 == 0)
        for i in range(4)
    ]
    wide, narrow = io.StringIO(), io.StringIO()
    Console(file=wide, width=400).print(_table(runs, "right_change_mean"))
    Console(file=narrow, width=width).print(_table(runs, "right_change_mean"))
    assert set(wide.getvalue().split()) <= set(narrow.getvalue().split())
    assert max(map(len, narrow.getvalue().splitlines())) <= width
