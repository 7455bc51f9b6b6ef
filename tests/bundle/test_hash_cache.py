"""The hash cache: a verified file is not hashed again, unless it may have changed."""

import json
import os
import shutil
import threading
import time

import pytest

from cobra_edge import inspect
from cobra_edge.bundle import hash_cache
from cobra_edge.bundle.reader import DECODER, MANIFEST, Bundle, file_sha256
from cobra_edge.errors import BundleError
from cobra_edge.files import ownership
from cobra_edge.terminal.output import run_command

SECOND_NS = 1_000_000_000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return this test's own cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cobra_edge" / "hashes"


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def clock(monkeypatch):
    """Control the time at which hashing begins: by default an hour after the files were written."""
    now = {"ns": time.time_ns() + 3600 * SECOND_NS}
    monkeypatch.setattr(hash_cache.time, "time_ns", lambda: now["ns"])
    return now


@pytest.fixture
def hashed(monkeypatch):
    """Return a list that gets an entry for each file that is hashed."""
    real, calls = hash_cache.content_sha256, []

    def count(stream, *rest):
        calls.append(str(stream.name))
        return real(stream, *rest)

    monkeypatch.setattr(hash_cache, "content_sha256", count)
    return calls


def test_a_whole_file_is_hashed_once(bundle, cache, clock, hashed):
    Bundle.open(bundle)
    n_files = len(Bundle.open(bundle).manifest.files)
    assert len(hashed) == n_files == len(list(cache.iterdir()))
    Bundle.open(bundle.parent / "cache" / ".." / "bundle")
    assert len(hashed) == n_files


def test_thorough_hashes_what_is_remembered(bundle, cache, clock, hashed):
    n_files = len(Bundle.open(bundle).manifest.files)
    Bundle.open(bundle, thorough=True)
    assert len(hashed) == 2 * n_files
    assert run_command(inspect.command, [str(bundle)]) == 0
    assert len(hashed) == 3 * n_files
    Bundle.open(bundle)
    assert len(hashed) == 3 * n_files


def flip_a_byte(file):
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))


def test_content_changed_under_an_old_mtime(bundle, cache, clock):
    Bundle.open(bundle)
    before = (bundle / DECODER).stat()
    flip_a_byte(bundle / DECODER)
    os.utime(bundle / DECODER, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (bundle / DECODER).stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_another_file_in_its_place(bundle, cache, clock):
    Bundle.open(bundle)
    shutil.copy2(bundle / DECODER, bundle / "other")
    flip_a_byte(bundle / "other")
    shutil.copystat(bundle / DECODER, bundle / "other")
    os.replace(bundle / "other", bundle / DECODER)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_another_hash_in_the_manifest(bundle, cache, clock):
    Bundle.open(bundle)
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"][DECODER]["sha256"] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle)


def test_what_is_found_changed_is_forgotten(bundle, cache, clock, monkeypatch):
    """A failing disk leaves no trace in the timestamps; once a mismatch is found, the cache entry is gone."""
    Bundle.open(bundle)
    n_entries = len(list(cache.iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(hash_cache, "content_sha256", lambda stream, *_: "0" * 64)
        with pytest.raises(BundleError, match="sha256 differs"):
            Bundle.open(bundle, thorough=True)
    assert len(list(cache.iterdir())) < n_entries


@pytest.mark.parametrize("age_ns", [-3600 * SECOND_NS, -1, 0, 2 * SECOND_NS - 1])
def test_a_young_file_is_not_remembered(bundle, cache, clock, hashed, age_ns):
    file = bundle / DECODER
    clock["ns"] = max(file.stat().st_mtime_ns, file.stat().st_ctime_ns) + age_ns
    sha256 = Bundle.open(bundle).manifest.files[DECODER].sha256
    hashed.clear()
    for _ in range(2):
        assert hash_cache.first_changed([(file, sha256)]) is None
    assert hashed == [str(file)] * 2
    clock["ns"] += 2 * SECOND_NS - age_ns
    for _ in range(2):
        assert hash_cache.first_changed([(file, sha256)]) is None
    assert len(hashed) == 3


def test_a_future_mtime_is_not_remembered(bundle, cache, clock, hashed):
    file = bundle / DECODER
    os.utime(file, ns=(clock["ns"], clock["ns"] + SECOND_NS))
    for _ in range(2):
        Bundle.open(bundle)
    assert hashed.count(str(file)) == 2


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(bundle, cache, clock, monkeypatch):
    real = hash_cache.content_sha256

    def touch(stream, *rest):
        got = real(stream, *rest)
        os.utime(stream.name)
        return got

    monkeypatch.setattr(hash_cache, "content_sha256", touch)
    Bundle.open(bundle)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 4000, b"\xff\xfe", b'{"device": 1}', b"x" * 10_000])
def test_an_entry_that_is_none(bundle, cache, clock, hashed, content):
    n_files = len(Bundle.open(bundle).manifest.files)
    for entry in cache.iterdir():
        entry.write_bytes(content)
    Bundle.open(bundle)
    assert len(hashed) == 2 * n_files
    Bundle.open(bundle)
    assert len(hashed) == 2 * n_files


def test_an_entry_of_somebody_else(bundle, cache, clock, hashed, monkeypatch):
    n_files = len(Bundle.open(bundle).manifest.files)
    monkeypatch.setattr(ownership, "_trusted_users", lambda: {12345})
    Bundle.open(bundle)
    assert len(hashed) == 2 * n_files


@pytest.mark.parametrize(
    "put",
    [
        lambda e, c: e.chmod(0o666),
        lambda e, c: (e.unlink(), os.mkfifo(e)),
        lambda e, c: (e.unlink(), c.write_bytes(b"{}"), e.symlink_to(c)),
    ],
)
def test_an_entry_that_others_could_have_put_there_is_not_believed(bundle, cache, tmp_path, clock, hashed, put):
    n_files = len(Bundle.open(bundle).manifest.files)
    for entry in cache.iterdir():
        put(entry, tmp_path / "elsewhere")
    Bundle.open(bundle)
    assert len(hashed) == 2 * n_files


def test_a_cache_that_cannot_be_written(bundle, tmp_path, clock, hashed, monkeypatch, caplog):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("DEBUG", hash_cache.__name__):
        n_files = len(Bundle.open(bundle).manifest.files)
    Bundle.open(bundle)
    assert len(hashed) == 2 * n_files and "hash not cached" in caplog.text
    assert not [r for r in caplog.records if r.levelname != "DEBUG"]


def test_a_full_disk_leaves_no_draft(bundle, cache, clock, monkeypatch):
    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hash_cache.os, "replace", replace)
    Bundle.open(bundle)
    assert not list(cache.iterdir())


def test_a_user_without_a_home(bundle, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(hash_cache.platformdirs, "user_cache_path", lambda name: hash_cache.Path("~/.cache") / name)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    Bundle.open(bundle)
    assert sorted(tmp_path.iterdir()) == before


def test_of_several_errors_the_first_is_told(tmp_path, cache):
    """The first in the given order is returned, whichever thread finishes first."""
    files = []
    for i in range(12):
        file = tmp_path / str(i)
        file.write_bytes(bytes(1 << 22 if i == 3 else 1))
        files.append((file, "wrong" if i >= 3 else file_sha256(file)))
    for _ in range(5):
        assert hash_cache.first_changed(files) == tmp_path / "3"
    (tmp_path / "3").unlink()
    with pytest.raises(FileNotFoundError):
        hash_cache.first_changed(files)
    assert hash_cache.first_changed([]) is None


def test_one_changed_file_does_not_wait_for_the_others(tmp_path, cache, monkeypatch):
    for name in ("small", "large"):
        (tmp_path / name).write_bytes(b"x")
    stopped, both = [], threading.Barrier(2)

    def endless(stream, stop):
        both.wait(60)
        if str(stream.name).endswith("large"):
            assert stop.wait(60)
            stopped.append(threading.current_thread())
            raise hash_cache.CancelledError
        return "what it is"

    monkeypatch.setattr(hash_cache, "content_sha256", endless)
    monkeypatch.setattr(hash_cache, "default_threads", lambda: 2)
    assert hash_cache.first_changed([(tmp_path / "small", "other"), (tmp_path / "large", "other")]) == tmp_path / "small"
    assert stopped
