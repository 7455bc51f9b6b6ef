"""The commit of an installation: of its own checkout or wheel, never of a repository around it."""

import subprocess

import pytest

from cobra_edge.environment.source_commit import source_commit


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.delenv("COBRA_COMMIT", raising=False)
    (tmp_path / "cobra_edge").mkdir()
    return tmp_path / "cobra_edge"


def commit(folder):
    def git(*arguments):
        return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "--message=x", "--allow-empty")
    return git("rev-parse", "--short", "HEAD")


def test_of_a_checkout(package):
    (package.parent / "pyproject.toml").touch()
    made = commit(package.parent)
    assert source_commit(package) == made
    (package.parent / "pyproject.toml").write_text("changed")
    assert source_commit(package) == f"{made}-dirty"


def test_of_a_wheel_inside_another_repository(package):
    commit(package.parent)
    assert source_commit(package) is None
    (package / "data").mkdir()
    (package / "data" / "commit").write_text("abc1234\n")
    assert source_commit(package) == "abc1234"


@pytest.mark.parametrize("recorded", [b"", b"\xff"])  # no git at the build; damaged
def test_unknown_or_told_by_a_variable(package, monkeypatch, recorded):
    (package / "data").mkdir()
    (package / "data" / "commit").write_bytes(recorded)
    assert source_commit(package) is None
    monkeypatch.setenv("COBRA_COMMIT", "def5678")
    assert source_commit(package) == "def5678"


def test_without_git(package, monkeypatch):
    (package.parent / "pyproject.toml").touch()
    (package.parent / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert source_commit(package) is None
