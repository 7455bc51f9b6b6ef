"""The command, end to end: exit codes, refusals, interrupted runs, repeated runs, long suites."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.regress import runner
from cobra_edge.regress.budget import read_budget
from cobra_edge.regress.command import command
from cobra_edge.regress.gates import GATES, gate_of
from cobra_edge.regress.golden import read_golden
from cobra_edge.regress.journal import locked
from cobra_edge.regress.measures import measure_named
from cobra_edge.regress.report import read_report
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.terminal.output import run_command

from ..conftest import MINI
from .regress_lines import write_lines

LINES = read_suite(HELDOUT)
QUIET = ["--attribution-lines", "0", "--threads", "1", "--commit", "c0ffee"]


@pytest.fixture(scope="module")
def build(mini_bundle):
    return mini_bundle("w4a16-g128")


@pytest.fixture(scope="module")
def known(build):
    """Return the lines that the build's golden lines can answer."""
    return [tokenized.line for tokenized in read_golden(Bundle.open(build)).suite.lines]


@pytest.fixture
def regress(build, capfd):
    """Return a function that runs the command on the build: exit code, stdout, stderr on one line."""

    def call(*arguments, bundle=build):
        capfd.readouterr()
        given = [str(bundle), "--lines", "10", "--threads", "1", "--attribution-lines", "0", "--commit", "c0ffee"]
        code = run_command(command, [*given, *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


@pytest.fixture
def lax(tmp_path):
    """Return a budget that everything is within, of however few images: a maximum has no interval."""
    file = tmp_path / "lax.toml"
    file.write_text("[schemes.w4a16-g128]\nkld_max = {max = 1e9}\n")
    return file


BASE_INSTALL = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name in {"jinja2", "junitparser", "matplotlib", "onnx", "scipy", "tomlkit", "torch"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NotInstalled())
from cobra_edge.regress.command import command
from cobra_edge.terminal.output import run_command
"""


def without_times(report):
    data = json.loads(report) if isinstance(report, str | bytes) else report
    return {key: value for key, value in data.items() if key != "times"}


# --- exit codes and outputs -------------------------------------------------------------------------------------------------


def test_within_the_budget(regress, lax, tmp_path):
    code, out, err = regress("--budget", lax, "--report", tmp_path / "drift")
    assert code == 0 and "error" not in err and "kld_mean" in out
    assert {f.name for f in (tmp_path / "drift").iterdir()} - {".lines.lock"} == {
        "report.json", "report.md", "report.html", "junit.xml", "badge.svg", "lines.jsonl",
    }  # fmt: skip
    report = read_report(tmp_path / "drift" / "report.json")
    assert report.passed and report.suite.lines == 10
    gates = {"absolute": ["kld_max"], "recorded": ["kld_change", "prompt_kld_change", "reply_change"]}
    assert {gate: [v.measure for v in report.verdicts if gate_of(v) == gate] for gate in gates} == gates
    assert set(report.not_judged) == set(GATES) - set(gates)
    assert (report.commit, report.budget) == ("c0ffee", "lax.toml")
    assert len((tmp_path / "drift" / "lines.jsonl").read_text().splitlines()) == 11


def test_beyond_the_budget(regress, tmp_path):
    strict = tmp_path / "strict.toml"
    strict.write_text("[schemes.w4a16-g128]\nkld_max = {max = 1e-12}\nkld_median = {max = 1e9}\n")
    code, _, err = regress("--budget", strict, "--report", tmp_path / "drift", "--lines", "32")
    assert code == 1 and "gate absolute failed: kld_max (max); do not ship this build" in err
    assert not read_report(tmp_path / "drift" / "report.json").passed  # a report is there all the same


def test_too_few_images_to_judge_do_not_pass(regress, tmp_path):
    budget = tmp_path / "budget.toml"
    budget.write_text("[schemes.w4a16-g128]\nkld_max = {max = 1e9}\nkld_mean = {max = 1e9}\nkld_median = {max = 1e9}\n")
    code, out, err = regress("--budget", budget, "--lines", "5")
    images = read_golden_images(out)
    assert code == 1 and f"too few to judge ({images} images; 8 needed): use a larger suite" in err
    assert (
        f"({images} images; 16 needed): use a larger suite, or export with more --golden-lines; not judged: kld_median" in err
    )
    assert "not judged: kld_mean (max); " in err and "; do not ship this build" in err and "exceeded" not in err
    assert "FAILED: 2 of 6 limits not judged" in out and "NOT JUDGED" in out and "held" in out


def read_golden_images(out):
    (images,) = re.findall(r" lines, (\d+) images, ", " ".join(out.split()))
    return int(images)


def test_json_is_all_that_stdout_has(regress, lax, tmp_path):
    code, out, err = regress("--budget", lax, "--json", "--report", tmp_path)
    assert code == 0 and out.encode() == (tmp_path / "report.json").read_bytes()
    assert json.loads(out)["passed"] is True and "lines" in err


def test_options_before_the_bundle(build, lax, capfd):
    given = ["--lines", "10", "--attribution-lines", "0", "--budget", str(lax), str(build)]
    assert run_command(command, given) == 0


def test_two_runs_give_the_same_report(regress, lax, tmp_path):
    for name in ("a", "b"):
        assert regress("--budget", lax, "--report", tmp_path / name, "--attribution-lines", "4")[0] == 0
    first, second = ((tmp_path / name / "report.json").read_bytes() for name in ("a", "b"))
    assert without_times(first) == without_times(second)
    assert (tmp_path / "a" / "lines.jsonl").read_bytes() == (tmp_path / "b" / "lines.jsonl").read_bytes()


def test_the_budget_that_ships(regress):
    code, out, _ = regress("--json")
    assert code in (0, 1) and json.loads(out)["budget"] == "the default budget" and json.loads(out)["verdicts"]


def test_todays_figures_become_the_budget(regress, build, tmp_path):
    """What was written passes at once; a build of another scheme finds nothing there."""
    file = tmp_path / "new.toml"
    code, _, err = regress("--budget", file, "--update-budget", "--margin", "0.1", "--lines", "32")
    assert code == 0 and "limits of w4a16-g128: kld_mean, " in err and "nothing was judged: review the limits" in err
    limits = read_budget(file).schemes["w4a16-g128"]
    assert {"kld_mean", "top1_agreement", "vision_error", "state_error.0", "state_error.3"} <= set(limits)
    code, out, _ = regress("--budget", file, "--json", "--lines", "32")
    absolute = [v for v in json.loads(out)["verdicts"] if measure_named(v["measure"]).gate == "absolute"]
    assert code == 0 and len(absolute) == len(limits)
    # An export judges by it too: nothing in it is something that an export does not measure.
    assert set(limits) <= set(Bundle.open(build).manifest.drift.measures)


def test_too_few_images_make_no_budget(regress, tmp_path):
    code, _, err = regress("--budget", tmp_path / "new.toml", "--update-budget", "--lines", "5")
    assert code == 0 and "no new limit of kld_mean, kld_p99, " in err and "of too few images; use a larger suite" in err
    assert "kld_mean" not in (tmp_path / "new.toml").read_text()


# --- refusals ---------------------------------------------------------------------------------------------------------------


BAD = {
    "not JSON": (b"{no", "not JSON"),
    "no answer": (b'{"prompt": "p", "task": "t"}', "answer is empty or missing"),
    "no task": (b'{"prompt": "p", "answer": "a"}', "task is empty or missing"),
    "an empty question": (b'{"prompt": " ", "answer": "a", "task": "t"}', "prompt is empty"),
    "an unknown metric": (b'{"prompt": "p", "answer": "a", "task": "t", "metric": "exat"}', "metric 'exat' is unknown"),
    "no image there": (b'{"prompt": "p", "answer": "a", "task": "t", "image": "heldout/none.png"}', "none.png does not exist"),
    "an image that is none": (b'{"prompt": "p", "answer": "a", "task": "t", "image": "corrupt.png"}', "corrupt.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_or_counted(regress, lax, known, tmp_path, name):
    text, says = BAD[name]
    png = (MINI / "demo.png").read_bytes()
    suite = write_lines(tmp_path / "s", [*known[:6], text, *known[6:12]])
    (tmp_path / "s" / "corrupt.png").write_bytes(png[: len(png) // 2])
    code, out, err = regress("--suite", suite, "--budget", lax, "--lines", "100")
    assert code == 2 and "suite.jsonl, line 7: " in err and says in err and out == ""
    code, out, err = regress("--suite", suite, "--budget", lax, "--lines", "100", "--skip-bad", "--json")
    found = json.loads(out)["suite"]
    assert code == 0 and found["lines"] == 12 and list(found["skipped"]) == ["7"] and says in found["skipped"]["7"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no lines; expected at least one question"), (b"\n\n", "no lines"), (b"{}\n", "line 1"), (None, "cannot be read")],
)
def test_a_suite_of_nothing(regress, tmp_path, content, says):
    if content is not None:
        (tmp_path / "s.jsonl").write_bytes(content)
    code, _, err = regress("--suite", tmp_path / "s.jsonl")
    assert code == 2 and says in err
    code, _, err = regress("--suite", tmp_path / "s.jsonl", "--skip-bad")
    assert code == 2 and err.startswith("error: ") or "s.jsonl" in err


def test_a_suite_of_which_nothing_is_left(regress, tmp_path):
    suite = write_lines(tmp_path, [b'{"prompt": "p", "answer": "a", "task": "t", "image": "corrupt.png"}'])
    (tmp_path / "corrupt.png").write_bytes(b"")
    code, _, err = regress("--suite", suite, "--skip-bad")
    assert code == 2 and "all lines were skipped" in err


def test_a_suite_about_one_image(regress, known, tmp_path):
    code, _, err = regress("--suite", write_lines(tmp_path, [known[0]]), "--budget", tmp_path / "b.toml", "--update-budget")
    assert code == 2 and "lines about one image; lines about one image fail together" in err and "lines 0" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--baseline", "TINY"), 2, "only builds of one checkpoint can be compared"),
        (("--baseline", "/nowhere"), 2, "/nowhere"),
        (("--budget", "/nowhere.toml"), 2, "no such budget; write one"),
        (("--update-budget",), 2, "--update-budget needs --budget, the file to write"),
        (("--update-budget", "--budget", "b.toml", "--against", "x"), 2, "--update-budget judges nothing, so it takes no"),
        (("--report", "/dev/null"), 2, "/dev/null: cannot be written"),
        (("--report", "/dev/null/x"), 2, "/dev/null/x: cannot be written"),
        (("--report", "/proc/x"), 2, "/proc/x: cannot be written"),
        (("--previous", "/nowhere.json"), 2, "/nowhere.json: cannot be read"),
        (("--history", "/dev/null/x"), 2, "/dev/null"),
        (("--lines", "1"), 2, "--lines: "),
        (("--margin", "-1"), 2, "--margin: "),
        (("--vision-runtime", "tensorrt"), 3, "tensorrt"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(regress, tiny_bundle, monkeypatch, arguments, code, says):
    monkeypatch.setattr(runner, "_aggregate", None)  # before anything is measured
    found, out, err = regress(*(str(tiny_bundle) if a == "TINY" else a for a in arguments))
    assert (found, out) == (code, "") and says in err and "Traceback" not in err and err.count("error: ") == 1


@pytest.mark.parametrize("text", ["[schemes.w4a16-g128]\nkld_maen = {max = 1}", "[schemes.w4a16]", "[shcemes.w4a16-g128]"])
def test_a_budget_with_unknown_names(regress, tmp_path, text):
    (tmp_path / "b.toml").write_text(text)
    code, out, err = regress("--budget", tmp_path / "b.toml")
    assert (code, out) == (2, "") and ("kld_mean" in err or "w4a16-g128" in err or "shcemes" in err)


def test_what_is_no_bundle(regress, tmp_path):
    for bundle in (tmp_path, tmp_path / "none", MINI / "demo.png"):
        code, out, err = regress(bundle=bundle)
        assert (code, out) == (2, "") and "is not a bundle, it has no manifest.json" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_report_where_nothing_may_be_written(regress, tmp_path):
    tmp_path.chmod(0o500)
    code, _, err = regress("--report", tmp_path / "drift")
    assert code == 2 and "cannot be written" in err


@pytest.mark.parametrize("module", ["junitparser", "jinja2", "matplotlib", "tomlkit"])
def test_a_library_that_an_output_lacks_is_named_before_anything_is_measured(regress, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(runner, "_aggregate", None)
    given = ("--report", tmp_path / "drift") if module != "tomlkit" else ("--budget", tmp_path / "b.toml", "--update-budget")
    code, out, err = regress(*given)
    assert (code, out) == (3, "") and f"needs {module}" in err and "pip install '.[regress]'" in err


def test_a_bad_budget_to_update_is_refused_before_anything_is_measured(regress, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_aggregate", None)
    (tmp_path / "b.toml").write_text("[schemes.fp16]\nkld_maen = {max = 1}")
    code, out, err = regress("--budget", tmp_path / "b.toml", "--update-budget")
    assert (code, out) == (2, "") and "kld_maen" in err


def test_a_base_install_gives_a_verdict_with_intervals(build, tmp_path):
    """Without the libraries of any extra: the table, the intervals and the exit code."""
    budget = tmp_path / "budget.toml"
    budget.write_text("[schemes.w4a16-g128]\nkld_mean = {max = 100}\naccuracy_change = {min = -1}\nkld_p99 = {max = 1e-9}\n")
    code = BASE_INSTALL + f"sys.exit(run_command(command, [{str(build)!r}, '--budget', {str(budget)!r}, *{QUIET}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "gate absolute failed: kld_p99 (max); do not ship this build" in " ".join(done.stderr.split())
    assert "FAILED: 1 of 6 limits exceeded" in done.stdout and done.stdout.count("held") >= 2
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("kld_mean ") and "≤ 100" in line)
    assert " – " in row


# --- interrupted, and long --------------------------------------------------------------------------------------------------

RUN = [sys.executable, "-m", "cobra_edge.regress"]


def hear_interruptions():
    """Who runs these tests in the background has made their children deaf."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_run_goes_on_where_it_was(build, known, lax, tmp_path, monkeypatch, capfd):
    suite = write_lines(tmp_path, known * 12)
    given = [str(build), "--suite", str(suite), "--budget", str(lax), *QUIET]
    child = subprocess.Popen(
        [*RUN, *given, "--report", str(tmp_path / "cut")], stderr=subprocess.PIPE, text=True, preexec_fn=hear_interruptions
    )
    partial = tmp_path / "cut" / "lines.partial.jsonl"
    while not partial.exists() or partial.read_bytes().count(b"\n") < 20:
        assert child.poll() is None, child.stderr.read()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err.strip().splitlines()[-1] == "interrupted" and "Traceback" not in err
    assert {f.name for f in (tmp_path / "cut").iterdir()} - {".lines.lock"} == {partial.name}
    done, measured, real = partial.read_bytes().count(b"\n") - 1, [], runner.measure_line
    assert 19 <= done < len(known) * 12
    monkeypatch.setattr(runner, "measure_line", lambda *a: measured.append(1) or real(*a))
    for name, count in (("cut", len(known) * 12 - done), ("whole", len(known) * 12)):
        measured.clear()
        assert run_command(command, [*given, "--report", str(tmp_path / name)]) == 0
        assert len(measured) == count
    cut, whole = ((tmp_path / name / "report.json").read_bytes() for name in ("cut", "whole"))
    assert without_times(cut) == without_times(whole)
    assert (tmp_path / "cut" / "lines.jsonl").read_bytes() == (tmp_path / "whole" / "lines.jsonl").read_bytes()
    assert not partial.exists()


def test_a_run_that_was_interrupted_after_its_last_line_asks_nothing(build, known, lax, tmp_path, monkeypatch, capfd):
    suite, report, history = write_lines(tmp_path, known), tmp_path / "report", tmp_path / "history.jsonl"
    history.touch()  # as a full disk left it
    given = [
        str(build),
        "--suite",
        str(suite),
        "--budget",
        str(lax),
        *QUIET,
        "--report",
        str(report),
        "--history",
        str(history),
    ]
    assert run_command(command, given) == 0
    (report / "lines.jsonl").rename(report / "lines.partial.jsonl")

    def nothing_is_left(*_):
        raise ValueError("called without lines")

    monkeypatch.setattr(runner, "predictions", nothing_is_left)
    opened = runner.open_baseline
    monkeypatch.setattr(runner, "open_baseline", lambda *a: dataclasses.replace(opened(*a), predictions=nothing_is_left))
    assert run_command(command, given) == 0
    assert (report / "lines.jsonl").exists() and history.read_bytes().count(b"\n") == 2


def test_two_runs_do_not_write_one_report(build, known, lax, tmp_path, capfd):
    suite, report = write_lines(tmp_path, known), tmp_path / "report"
    report.mkdir()
    with locked(report):
        given = [str(build), "--suite", str(suite), "--budget", str(lax), *QUIET, "--report", str(report)]
        assert run_command(command, given) == 2
    assert f"another run (process {os.getpid()}) writes its report there" in capfd.readouterr().err.replace("\n", " ")
    assert not (report / "report.json").exists() and not list(report.glob("lines*"))


def test_an_interrupted_run_of_another_suite_begins_anew(build, known, lax, tmp_path, monkeypatch, capfd):
    given = [str(build), "--budget", str(lax), *QUIET, "--report", str(tmp_path / "drift")]
    real, measured = runner.measure_line, []

    def interrupted(*arguments):
        measured.append(1)
        if len(measured) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "measure_line", interrupted)
    assert run_command(command, [*given, "--suite", str(write_lines(tmp_path, known[:10]))]) == 130
    assert run_command(command, [*given, "--suite", str(write_lines(tmp_path, known[1:11]))]) == 0
    assert len(measured) == 6 + 10


def test_a_run_interrupted_in_its_attribution_does_not_ask_again(build, lax, tmp_path, monkeypatch, capfd):
    given = [str(build), "--budget", str(lax), "--lines", "10", "--report", str(tmp_path / "drift")]
    tried, measured, real = runner.attribution, [], runner.measure_line

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "measure_line", lambda *a: measured.append(1) or real(*a))
    monkeypatch.setattr(runner, "attribution", interrupted)
    assert run_command(command, given) == 130 and len(measured) == 10
    monkeypatch.setattr(runner, "attribution", tried)
    assert run_command(command, given) == 0 and len(measured) == 10
    assert read_report(tmp_path / "drift" / "report.json").attribution is not None


def peak_mb(*arguments):
    """Return the largest resident size of a process that runs the command, in MB."""
    program = (
        "import resource, sys; from cobra_edge.regress.command import command\n"
        "from cobra_edge.terminal.output import run_command\n"
        "code = run_command(command, sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stderr.splitlines()[-1])


def test_memory_does_not_grow_with_the_suite(tiny_bundle, tmp_path):
    """A prediction of these lines takes 40 kB or more: 1,800 lines of them would be 70 MB."""
    lax = tmp_path / "lax.toml"
    lax.write_text("[schemes.w8a16-g128]\n")
    peaks = []
    for count in (200, 2000):
        lines = [json.dumps({"prompt": line.prompt, "answer": line.answer, "task": line.task}).encode() for line in LINES]
        suite = write_lines(tmp_path / str(count), [lines[i % len(lines)] for i in range(count)])
        given = [str(tiny_bundle), "--baseline", str(tiny_bundle), "--suite", str(suite), "--budget", str(lax), *QUIET]
        peaks.append(peak_mb(*given))
    assert peaks[1] - peaks[0] < 24, peaks
