"""The journal: an interrupted run goes on where it was, whatever was cut off, and never with lines of another run."""

import errno
import subprocess
import sys

import numpy as np
import pytest

from cobra_edge.errors import InputError
from cobra_edge.regress.journal import PARTIAL, WHOLE, fingerprint_of, journal, locked

from .regress_lines import line_metrics

RUN = fingerprint_of("a build", "a baseline")
LINES = [line_metrics(i, None if i % 2 else i, answer_kld=[0.1 * i, 1e-9], text=f"“{i}”\n") for i in range(1, 7)]


class Interrupted(Exception):
    pass


def run(directory, fingerprint=RUN, stop_after=None):
    """Write the lines that are not there yet; returns those that were."""
    with journal(directory, fingerprint) as kept:
        for done, line in enumerate(LINES[len(kept.done) :]):
            if done == stop_after:
                raise Interrupted
            kept.write(line)
    return kept.done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the bytes of an uninterrupted run's lines."""
    directory = tmp_path_factory.mktemp("whole")
    assert run(directory) == [] and not (directory / PARTIAL).exists()
    return (directory / WHOLE).read_bytes()


@pytest.mark.parametrize("done", range(len(LINES) + 1))
def test_a_run_goes_on_after_any_line(tmp_path, whole, done):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=done)
        raise Interrupted  # after the last line nothing is left to be interrupted
    if done < len(LINES):
        assert not (tmp_path / WHOLE).exists() and (tmp_path / PARTIAL).exists()
        assert run(tmp_path) == LINES[:done]
    assert (tmp_path / WHOLE).read_bytes() == whole and not (tmp_path / PARTIAL).exists()


def test_a_line_is_in_the_file_at_once(tmp_path):
    """A process that is killed flushes nothing."""
    with pytest.raises(Interrupted), journal(tmp_path, RUN) as kept:
        kept.write(LINES[0])
        assert (tmp_path / PARTIAL).read_bytes().count(b"\n") == 2
        raise Interrupted


def test_a_run_goes_on_after_a_cut_anywhere(tmp_path, whole):
    """A killed process, a full disk: the file may end in the middle of a line, of the first too."""
    header = whole.index(b"\n") + 1
    cuts = np.unique(np.random.default_rng(0).integers(0, len(whole), 60).tolist() + [0, 1, header - 1, header, len(whole)])
    for cut in cuts:
        (tmp_path / PARTIAL).write_bytes(whole[:cut])
        assert run(tmp_path) == LINES[: max(whole[:cut].count(b"\n") - 1, 0)]
        assert (tmp_path / WHOLE).read_bytes() == whole


def test_what_follows_a_damaged_line_is_not_believed(tmp_path, whole):
    lines = whole.split(b"\n")
    for damage in (b"{}", b"\xff\xfe", b"[" * 100_000, lines[3][:-1] + b',"more":1}'):
        (tmp_path / PARTIAL).write_bytes(b"\n".join([*lines[:3], damage, *lines[4:]]))
        assert run(tmp_path) == LINES[:2]
        assert (tmp_path / WHOLE).read_bytes() == whole


@pytest.mark.parametrize("start", [b"\n", b"junk\n", b"\xff\n", b'{"fingerprint": 1}\n', b"[" * 100_000 + b"\n"])
def test_what_is_no_journal_is_begun_anew(tmp_path, whole, start):
    (tmp_path / PARTIAL).write_bytes(start + whole)
    assert run(tmp_path) == [] and (tmp_path / WHOLE).read_bytes() == whole


def test_another_run_begins_anew(tmp_path, whole):
    with pytest.raises(Interrupted):
        run(tmp_path, fingerprint_of("a build", "another baseline"), stop_after=4)
    assert run(tmp_path) == [] and (tmp_path / WHOLE).read_bytes() == whole


def test_a_finished_run_is_measured_again(tmp_path, whole):
    run(tmp_path)
    assert run(tmp_path) == [] and (tmp_path / WHOLE).read_bytes() == whole


def test_without_a_directory_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(None) == [] and list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_of_every_part_and_its_place():
    assert len({fingerprint_of(*parts) for parts in [("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("", "ab"), ("a",)]}) == 6


HOLD = """
import sys, pathlib
from cobra_edge.regress.journal import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_into_one_report_is_refused_with_the_process_of_the_first(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"another run \(process {first.pid}\) writes its report there"), locked(tmp_path):
            pass
        first.kill()  # a process that dies holds nothing
        first.wait()
        with locked(tmp_path):
            pass


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    with locked(tmp_path):
        for content in (b"", b"not a number", b"9" * 5000):
            (tmp_path / ".lines.lock.pid").write_bytes(content)
            with pytest.raises(InputError, match="another run"), locked(tmp_path):
                pass


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, error):
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    with locked(tmp_path):
        pass
    assert "this file system does not support locks" in caplog.text


def test_a_directory_that_cannot_be_locked_is_refused(tmp_path, monkeypatch):
    refusal = OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("filelock.FileLock.acquire", lambda *_, **__: (_ for _ in ()).throw(refusal))
    with pytest.raises(InputError, match="cannot be locked"), locked(tmp_path):
        pass
