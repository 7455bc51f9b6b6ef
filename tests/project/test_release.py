"""The workflows: each step a make target that exists, each action pinned; and what a release takes from the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".github" / "release.py"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
CHANGELOG = """# Changelog

## 9.9.0, 2030-01-31

### Added

* See [the log](docs/log.md), [a page](https://example.com/x) and [above](#changelog).

## 9.8.0, unreleased

"""


def steps(workflow: Path) -> list[dict[str, object]]:
    return [s for job in yaml.safe_load(workflow.read_text())["jobs"].values() for s in job.get("steps", [])]


def test_there_are_three_workflows():
    assert [w.stem for w in WORKFLOWS] == ["ci", "drift", "release"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda w: w.stem)
class TestWorkflow:
    def test_each_command_is_a_make_target(self, workflow):
        jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
        rows = [row for job in jobs for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
        commands = [str(step["run"]) for step in steps(workflow) if "run" in step]
        wanted = {c.removeprefix("make ") for c in commands if c != 'make "$TARGET"'} | {row["target"] for row in rows}
        assert wanted and all(re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE) for target in wanted), wanted

    def test_actions_are_pinned_by_commit_and_tell_their_release(self, workflow):
        used = re.findall(r"uses: (.*)", workflow.read_text())
        assert used and [u for u in used if not re.match(r"\./|[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", u)] == []

    def test_permissions_are_those_to_read_unless_a_job_asks_for_more(self, workflow):
        assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}


def test_ci_runs_the_declared_pythons():
    rows = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["make"]["strategy"]["matrix"][
        "include"
    ]
    tested = {row["python"] for row in rows if row["target"] == "check"}
    assert tested == {f.stem.removeprefix("python") for f in (ROOT / "constraints").glob("python*.txt")}


@pytest.fixture
def tree(tmp_path):
    """Return a tree of version 9.9.0, in which the script runs."""
    (tmp_path / "cobra_edge").mkdir()
    (tmp_path / ".github").mkdir()
    (tmp_path / "cobra_edge" / "version.py").write_text('"""The version."""\n\n__version__ = "9.9.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    shutil.copy(SCRIPT, tmp_path / ".github")
    return tmp_path


def release(tree: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, tree / ".github" / "release.py", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


class TestRelease:
    def test_this_tree_has_a_section_of_its_version(self):
        code, notes, _ = release(ROOT, "notes")
        assert code == 0 and notes.startswith("### ")

    def test_the_tag_is_the_version(self, tree):
        assert release(tree, "check-tag", "v9.9.0")[0] == 0
        for tag in ("9.9.0", "v9.9", "v9.8.0", "v9.9.0\n", ""):
            code, out, error = release(tree, "check-tag", tag)
            assert (code, out) == (2, "") and "expected 'v9.9.0'" in error

    def test_an_undated_section_is_refused(self, tree):
        (tree / "CHANGELOG.md").write_text(CHANGELOG.replace("2030-01-31", "unreleased"))
        code, _, error = release(tree, "check-tag", "v9.9.0")
        assert code == 2 and "expected the day of the release as YYYY-MM-DD" in error

    def test_notes_are_the_section_with_links_that_lead_somewhere(self, tree):
        code, notes, _ = release(tree, "notes", "--links", "https://host/team/model/blob/v9.9.0/")
        assert code == 0 and notes.startswith("### Added\n") and "9.8.0" not in notes
        assert "[the log](https://host/team/model/blob/v9.9.0/docs/log.md)" in notes
        assert "(https://example.com/x)" in notes and "(#changelog)" in notes

    def test_a_version_without_changes_is_refused(self, tree):
        assert "expected what the release changes" in release(tree, "notes", "--version", "9.8.0")[2]
        code, _, error = release(tree, "notes", "--version", "1.0.0")
        assert code == 2 and "got the sections 9.9.0, 9.8.0, expected one of 1.0.0" in error
