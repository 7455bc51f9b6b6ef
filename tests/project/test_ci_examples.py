"""The examples for GitLab and Jenkins: their scripts as they are, with a small git, pip, export and curl of our own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..regress.test_build_gates import with_scales
from .test_workflow import PYTHON, ROOT

GITLAB, JENKINS = ROOT / "docs" / "regress-gitlab.yml", ROOT / "docs" / "regress-Jenkinsfile"
GIT = '#!/bin/sh\nmkdir "$6" && cp -r "$ROOT/constraints" "$6"\n'  # git clone --quiet --depth 1 URL cobra-edge
# Knows three requests: the list of notes, a new one, and an edit.
CURL = """#!{python}
import json, os, pathlib, sys
store, words = pathlib.Path(os.environ["STORE"]) / "notes.json", sys.argv[1:]
assert words[:5] == ["--silent", "--show-error", "--fail", "--header", "PRIVATE-TOKEN: secret"], words
notes = json.loads(store.read_text()) if store.exists() else [{{"id": 1, "body": "Looks good."}}]
address = "https://gitlab.example/api/v4/projects/5/merge_requests/7/notes"
if words[5:] == [address + "?per_page=100&sort=asc"]:
    sys.exit(print(json.dumps(notes)))
request, method, url, option, body = words[5:]
assert (request, option, body) == ("--request", "--data-urlencode", "body@note.md")
number = len(notes) + 1 if method == "POST" else int(url.rpartition("/")[2])
assert url == (address if method == "POST" else f"{{address}}/{{number}}")
notes = [n for n in notes if n["id"] != number] + [{{"id": number, "body": pathlib.Path("note.md").read_text()}}]
store.write_text(json.dumps(notes))
"""


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a script in a working copy with a budget: (exit code, what it said)."""
    for name, text in {"python": PYTHON, "git": GIT, "curl": CURL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable) if "{python}" in text else text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "copy" / "budgets").mkdir(parents=True)
    (tmp_path / "copy" / "budgets" / "drift.toml").write_text("[schemes.w4a16-g128]\nkld_max = { max = 100 }\n")
    (tmp_path / "copy" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "copy" / "venv" / "bin" / "activate").touch()
    (tmp_path / "bin" / "python3").symlink_to("true")
    (tmp_path / "bin" / "true").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "true").chmod(0o755)

    def run(shell: list[str], script: str, bundle: Path, **environment: str) -> tuple[int, str]:
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        ours = {"PATH": path, "ROOT": str(ROOT), "STORE": str(tmp_path), "BUNDLE": str(bundle), "EXPORT": "1"}
        ours |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run([*shell, script], cwd=tmp_path / "copy", env=os.environ | ours, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def worse(mini_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return with_scales(mini_bundle("w4a16-g128"), tmp_path / "worse", "x_proj", 1.1)


def test_gitlab_compares_a_merge_request_with_main(
    machine: Callable[..., tuple[int, str]], mini_bundle: Callable[..., Path], worse: Path, tmp_path: Path
) -> None:
    job: dict[str, Any] = yaml.safe_load(GITLAB.read_text())["drift"]
    copy, request = tmp_path / "copy", {"CI_MERGE_REQUEST_IID": "7", "CI_COMMIT_BRANCH": ""}

    def run(bundle: Path, **given: str) -> int:
        for folder in ("cobra-edge", "build", "drift"):  # GitLab begins with a clean copy and the cache
            shutil.rmtree(copy / folder, ignore_errors=True)
        environment = job["variables"] | {
            "CI_COMMIT_SHA": "5ca1ab1e" * 5, "CI_DEFAULT_BRANCH": "main", "CI_COMMIT_BRANCH": "main", "CI_PROJECT_ID": "5",
            "CI_API_V4_URL": "https://gitlab.example/api/v4", "CI_JOB_URL": "https://gitlab.example/jobs/1",
        }  # fmt: skip
        code, said = machine(["bash", "-eo", "pipefail", "-c"], "\n".join(job["script"]), bundle, **environment | given)
        after, also = machine(["bash", "-eo", "pipefail", "-c"], "\n".join(job["after_script"]), bundle, **environment | given)
        assert after == 0, also
        assert code in (0, 1), said
        return code

    good = mini_bundle("w4a16-g128")
    assert run(good) == 0 and (copy / "main-drift" / "lines.jsonl").is_file() and (copy / "history.svg").is_file()
    assert not (tmp_path / "notes.json").exists(), "main has no merge request to write to"
    assert run(good, **request) == 0 and not (tmp_path / "notes.json").exists(), "without a token nothing is written"
    assert run(good, **request, DRIFT_TOKEN="secret") == 0
    assert run(worse, **request, DRIFT_TOKEN="secret") == 1
    first, ours = json.loads((tmp_path / "notes.json").read_text())
    assert first["body"] == "Looks good." and ours["body"].startswith("**FAILED") and "gate **against** FAILED" in ours["body"]
    assert all((copy / path).exists() for path in job["artifacts"]["paths"])
    assert (copy / job["artifacts"]["reports"]["junit"]).is_file()
    assert job["cache"]["paths"] == ["drift.jsonl", "main-drift/"]


def test_jenkins_compares_a_branch_with_main(
    machine: Callable[..., tuple[int, str]], mini_bundle: Callable[..., Path], worse: Path, tmp_path: Path
) -> None:
    text = JENKINS.read_text()
    scripts = [textwrap.dedent(script) for script in re.findall(r"sh '''\n(.*?)'''", text, re.DOTALL)]
    given = dict(re.findall(r"(\w+) = '([^']*)'", text)) | {"SHARED": str(tmp_path / "shared"), "GIT_COMMIT": "5ca1ab1e" * 5}

    def run(bundle: Path, branch: str) -> int:
        for script in scripts:
            code, said = machine(["sh", "-xec"], script, bundle, BRANCH_NAME=branch, **given)
            assert code in (0, 1), said
            if code:
                return code
        return 0

    good, history = mini_bundle("w4a16-g128"), tmp_path / "shared" / "drift.jsonl"
    assert len(scripts) == 2 and run(good, "main") == 0 and run(good, "topic") == 0
    assert len(history.read_text().splitlines()) == 1, "only main's runs are kept"
    assert run(worse, "topic") == 1
    assert "gate **against** FAILED" in (tmp_path / "copy" / "drift" / "report.md").read_text()
    assert len((tmp_path / "copy" / "drift.jsonl").read_text().splitlines()) == 2
    junit = re.search(r"testResults: '([^']+)'", text)
    assert junit and (tmp_path / "copy" / junit.group(1)).is_file() and (tmp_path / "copy" / "history.svg").is_file()


def test_their_shell_is_sound(tmp_path: Path) -> None:
    job = yaml.safe_load(GITLAB.read_text())["drift"]
    scripts = {"bash": ["\n".join(job["script"]), "\n".join(job["after_script"])]}
    scripts["sh"] = re.findall(r"sh '''\n(.*?)'''", JENKINS.read_text(), re.DOTALL)
    for shell, texts in scripts.items():
        for text in texts:
            command = [Path(sys.executable).with_name("shellcheck"), "--shell", shell, "--exclude", "SC1091", "-"]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
