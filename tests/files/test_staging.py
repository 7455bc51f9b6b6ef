"""Atomic outputs: nothing that appears meanwhile is lost, and leftovers of killed runs are removed."""

import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from cobra_edge.bundle.reader import MANIFEST, staged_directory
from cobra_edge.errors import InputError
from cobra_edge.files import staging
from cobra_edge.files.staging import rename_new, scratch_directory, staged_file


@pytest.fixture(params=["renameat2", "neither flag"])
def system(request, monkeypatch):
    """Run with and without the flags of renameat2."""
    if request.param != "renameat2":
        monkeypatch.setattr(staging, "_renameat2", lambda *_: False)


def make_bundle(directory, content="old"):
    directory.mkdir(parents=True)
    (directory / MANIFEST).write_text(content)
    return directory


def write_bundle(stage, content="new"):
    (stage / MANIFEST).write_text(content)


def names(directory):
    return sorted(f.name for f in directory.iterdir())


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["a directory with a file", "a file", "a link"])
def test_what_appears_at_the_goal_stays_and_so_does_the_bundle(tmp_path, system, force, what):
    goal = tmp_path / "out" / "b"
    with (
        pytest.raises(InputError, match=r"appeared while this ran.*kept as .*out/b-2: rename it"),
        staged_directory(goal, force=force, needed_bytes=0) as stage,
    ):
        write_bundle(stage)
        if what == "a directory with a file":
            goal.mkdir()
            (goal / "thesis.txt").write_text("years")
        elif what == "a file":
            goal.write_text("years")
        else:
            (tmp_path / "thesis.txt").write_text("years")
            goal.symlink_to(tmp_path / "thesis.txt")
    assert (goal / "thesis.txt" if what == "a directory with a file" else goal).read_text() == "years"
    assert names(goal.parent) == ["b", "b-2"] and (goal.parent / "b-2" / MANIFEST).read_text() == "new"


def test_exports_side_by_side_all_keep_what_they_made(tmp_path, system):
    goal, told = tmp_path / "b", []
    stages = [staged_directory(goal, force=False, needed_bytes=0) for _ in range(3)]
    with ExitStack() as ends:
        for number, context in enumerate(stages):
            write_bundle(context.__enter__(), str(number))
        ends.pop_all()
    for context in stages:
        try:
            context.__exit__(None, None, None)
        except InputError as error:
            told.append(str(error))
    assert names(tmp_path) == ["b", "b-2", "b-3"]
    assert [(tmp_path / n / MANIFEST).read_text() for n in names(tmp_path)] == ["0", "1", "2"]
    assert len(told) == 2 and str(tmp_path / "b-2") in told[0] and str(tmp_path / "b-3") in told[1]


def test_with_force_the_goal_is_a_bundle_at_every_moment(tmp_path, monkeypatch):
    """If directories can be exchanged, the bundle always exists: no other rename is used."""
    goal = make_bundle(tmp_path / "b")
    if not staging.exchange(make_bundle(tmp_path / "x"), make_bundle(tmp_path / "y")):
        pytest.skip("this file system exchanges no directories")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("renamed"))
    with staged_directory(goal, force=True, needed_bytes=0) as stage:
        write_bundle(stage)
    assert (goal / MANIFEST).read_text() == "new" and names(tmp_path) == ["b", "x", "y"]


def test_what_takes_the_goal_s_place_before_the_exchange_comes_back(tmp_path, monkeypatch):
    goal, real = make_bundle(tmp_path / "b"), staging.exchange
    if not real(make_bundle(tmp_path / "x"), make_bundle(tmp_path / "y")):
        pytest.skip("this file system exchanges no directories")

    def late(one, other):
        monkeypatch.setattr(staging, "exchange", real)
        (other / MANIFEST).rename(other / "thesis.txt")
        return real(one, other)

    monkeypatch.setattr(staging, "exchange", late)
    with pytest.raises(InputError, match="b-2"), staged_directory(goal, force=True, needed_bytes=0) as stage:
        write_bundle(stage)
    assert names(goal) == ["thesis.txt"] and names(tmp_path / "b-2") == [MANIFEST]


def test_a_bundle_that_is_reached_by_a_link_is_replaced_where_it_lies(tmp_path, system):
    make_bundle(tmp_path / "b-v1")
    (tmp_path / "current").symlink_to("b-v1")
    with staged_directory(tmp_path / "current", force=True, needed_bytes=0) as stage:
        write_bundle(stage)
    assert (tmp_path / "current").is_symlink() and (tmp_path / "b-v1" / MANIFEST).read_text() == "new"


LEAVES = """
import os, signal, sys
from pathlib import Path
from cobra_edge.files.staging import scratch_directory
with scratch_directory(Path(sys.argv[1])) as scratch:
    (scratch / "decoder.safetensors").write_bytes(b"x")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    print(scratch, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_is_removed_and_what_another_works_in_is_not(tmp_path, caplog):
    goal = tmp_path / "b"
    command = [sys.executable, "-c", LEAVES, str(goal)]
    subprocess.run([*command, "killed"], check=False)
    (left,) = tmp_path.iterdir()
    running = subprocess.Popen([*command, "runs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    used = running.stdout.readline().strip()
    assert not left.exists() and names(tmp_path) == [os.path.basename(used)]
    with scratch_directory(goal), scratch_directory(tmp_path / "other"):
        assert os.path.isfile(f"{used}/decoder.safetensors")
    running.communicate("")
    assert names(tmp_path) == []


def test_what_is_not_ours_is_no_leftover(tmp_path, monkeypatch):
    (tmp_path / ".b.partial-file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".b.partial-link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".b.partial-theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with scratch_directory(tmp_path / "b"):
        pass
    assert names(tmp_path) == [".b.partial-file", ".b.partial-link", ".b.partial-theirs", "elsewhere"]


def test_a_file_system_without_locks_keeps_leftovers_and_works(tmp_path, monkeypatch):
    (tmp_path / ".b.partial-left").mkdir()

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staged_directory(tmp_path / "b", force=False, needed_bytes=0) as stage:
        write_bundle(stage)
    assert names(tmp_path) == [".b.partial-left", "b"]


def test_a_bundle_that_a_killed_run_had_moved_aside_comes_back(tmp_path):
    make_bundle(tmp_path / ".b.old-1" / "b")
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "b", force=True, needed_bytes=0):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["b"] and (tmp_path / "b" / MANIFEST).read_text() == "old"


def test_a_file_that_appears_stays_and_so_does_what_was_written(tmp_path, system):
    file = tmp_path / "s.json"
    with pytest.raises(InputError, match=r"kept as .*s-2\.json"), staged_file(file, force=False) as staged:
        staged.write_text("new")
        file.write_text("years")
    assert (file.read_text(), (tmp_path / "s-2.json").read_text()) == ("years", "new")
    with staged_file(file, force=True) as staged:
        staged.write_text("newer")
    assert file.read_text() == "newer" and names(tmp_path) == ["s-2.json", "s.json"]


def test_a_file_is_refused_before_work_or_written_whole(tmp_path, system):
    (tmp_path / "there").write_text("years")
    for file, force in ((tmp_path / "there", False), (tmp_path, True)):
        with pytest.raises(InputError, match="already there; give --force"), staged_file(file, force=force):
            pytest.fail("reached")
    with pytest.raises(InputError, match="cannot be written"), staged_file(tmp_path / "there" / "x", force=False):
        pytest.fail("reached")
    with pytest.raises(ZeroDivisionError), staged_file(tmp_path / "new" / "x", force=False) as staged:
        staged.write_text("half")
        raise ZeroDivisionError
    with staged_file(tmp_path / "y", force=False) as staged:
        staged.write_text("whole")
    assert names(tmp_path) == ["there", "y"]


@pytest.mark.parametrize("directory", [True, False])
def test_a_name_that_something_has_is_not_taken(tmp_path, system, directory):
    made, goal = tmp_path / "made", tmp_path / "goal"
    for path in (made, goal):
        path.mkdir() if directory else path.write_text(path.name)
    with pytest.raises(FileExistsError):
        rename_new(made, goal)
    rename_new(made, tmp_path / "free")
    assert names(tmp_path) == ["free", "goal"]
