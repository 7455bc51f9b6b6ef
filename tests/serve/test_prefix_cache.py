"""The prefix cache: lookups, eviction, damaged files."""

import errno
import hashlib
import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cobra_edge
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.decoder import DecoderState
from cobra_edge.errors import InputError
from cobra_edge.files import ownership
from cobra_edge.formats.model_config import MambaConfig
from cobra_edge.serve import prefix_cache_disk
from cobra_edge.serve.prefix_cache import PrefixCache
from cobra_edge.serve.prefix_cache_disk import PrefixCacheDisk

from ..conftest import MINI
from ..emulated.driver import plugged_in
from ..emulated.weights import random_weights

SMALL = MambaConfig(8, 2, 16, 8, 2, 3, 2)
VALUES = 2 * 8 * (3 + 2) * 4  # bytes of conv and ssm
ENTRY = VALUES + 512
FINGERPRINT = "0123456789abcdef"


def key_of(name):
    return hashlib.sha256(str(name).encode()).digest()


def state_of(seed):
    rng = np.random.default_rng(seed)
    conv, ssm = (rng.standard_normal((2, 8, width)).astype(np.float32) for width in (3, 2))
    return DecoderState(conv, ssm, seed)


def same(got, expected):
    return (
        np.array_equal(got.conv, expected.conv) and np.array_equal(got.ssm, expected.ssm) and got.n_tokens == expected.n_tokens
    )


# In memory


class Remembered:
    """The naive reference: a list, the most recently used last."""

    def __init__(self, room):
        self.room, self.names, self.evicted = room, [], 0

    def longest(self, names):
        for i in reversed(range(len(names))):
            if names[i] in self.names:
                self.names.remove(names[i])
                self.names.append(names[i])
                return i
        return None

    def keep(self, name):
        if name in self.names:
            self.names.remove(name)
        elif len(self.names) == self.room and self.room:
            self.names.pop(0)
            self.evicted += 1
        if self.room:
            self.names.append(name)


@given(
    st.integers(0, 4),
    st.lists(st.one_of(st.integers(0, 7), st.lists(st.integers(0, 7), unique=True)), max_size=40),
)
def test_the_least_recently_used_states_are_given_up(room, doings):
    cache, reference = PrefixCache(room * ENTRY + ENTRY - 1), Remembered(room)
    hits = misses = 0
    for doing in doings:
        if isinstance(doing, int):
            cache.keep(key_of(doing), state_of(doing))
            reference.keep(doing)
        else:
            found, expected = cache.longest([key_of(name) for name in doing]), reference.longest(doing)
            hits, misses = hits + (expected is not None), misses + (expected is None)
            assert (found and found[0]) == expected
            assert found is None or same(found[1], state_of(doing[expected]))
        assert len(cache) == len(reference.names) and cache.size_bytes == len(cache) * ENTRY
    counts = cache.counts
    assert (counts.hits_memory, counts.misses, counts.evicted) == (hits, misses, reference.evicted)
    assert (counts.hits_disk, counts.refused_files) == (0, 0)


def test_a_kept_state_stays_as_it_was_and_is_not_written_to():
    cache, state = PrefixCache(1 << 20), state_of(3)
    cache.keep(key_of(3), state)
    state.conv[:], state.ssm[:], state.n_tokens = 0, 0, 99
    _, kept = cache.longest([key_of(3)])
    assert same(kept, state_of(3))
    for array in (kept.conv, kept.ssm):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_key_that_is_kept_is_not_copied_again(monkeypatch):
    cache = PrefixCache(1 << 20)
    cache.keep(key_of(3), state_of(3))
    monkeypatch.setattr(DecoderState, "host", lambda self: pytest.fail("copied"))
    cache.keep(key_of(3), state_of(3))
    assert len(cache) == 1


@pytest.mark.parametrize("kernels", ["native", "numpy", "torch"])
@pytest.mark.parametrize("from_disk", [False, True])
def test_what_is_said_from_a_kept_state_is_what_was_said_before(mini_bundle, kernels, from_disk, tmp_path):
    session = cobra_edge.load(mini_bundle("w4a16-g128"), kernels=kernels)
    config = session.config.mamba
    looked = session.look(MINI / "demo.png")
    PrefixCache(0, PrefixCacheDisk(tmp_path, 1 << 30, config, FINGERPRINT)).keep(key_of("image"), looked, on_disk=True)
    cache = PrefixCache(1 << 30, PrefixCacheDisk(tmp_path, 1 << 30, config, FINGERPRINT))
    if not from_disk:
        cache.keep(key_of("image"), looked)
    _, kept = cache.longest([key_of("image")])
    assert cache.counts.hits_disk == from_disk and cache.counts.hits_memory == (not from_disk)
    before = kept.host()
    fresh, again = (session.decoder.new_state(like=state) for state in (looked, kept))
    for _ in range(2):
        tokens = session.codec.encode("What is in the image?")
        assert np.array_equal(session.prefill(tokens, fresh), session.prefill(tokens, again))
    assert same(again.host(), fresh.host()) and same(kept, before) and not same(again, before)


def test_a_state_on_a_gpu_is_kept_in_the_hosts_memory_and_goes_back_there(tmp_path):
    with plugged_in(tmp_path):
        decoder = CudaDecoder(random_weights(SMALL, "fp16"))
        looked, cache = decoder.new_state(like=state_of(3)), PrefixCache(ENTRY)
        cache.keep(key_of(3), looked)
        looked.fill(state_of(4))
        _, kept = cache.longest([key_of(3)])
        again = decoder.new_state(like=kept)
        assert isinstance(again, GpuState) and type(kept) is DecoderState
        assert same(kept, state_of(3)) and same(again, kept)
        decoder.step(1, again)
        assert same(kept, state_of(3)) and not np.array_equal(again.ssm, kept.ssm)


# Files


@pytest.fixture
def files(tmp_path):
    return PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, FINGERPRINT)


def path_of(files_directory, name, fingerprint=FINGERPRINT):
    return files_directory / fingerprint / f"{key_of(name).hex()}.safetensors"


def saved(tmp_path, files, name=1):
    files.save(key_of(name), state_of(name))
    return path_of(tmp_path / "states", name)


def size_of_a_file(tmp_path):
    files = PrefixCacheDisk(tmp_path / "measured", 1 << 20, SMALL, FINGERPRINT)
    files.save(key_of(0), state_of(0))
    return path_of(tmp_path / "measured", 0).stat().st_size


def test_states_come_back_after_a_restart(tmp_path, files):
    file = saved(tmp_path, files)
    again = PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, FINGERPRINT)
    loaded = again.load(key_of(1))
    assert same(loaded, state_of(1)) and not loaded.conv.flags.writeable and not loaded.ssm.flags.writeable
    assert again.load(key_of(2)) is None and again.refused == 0
    assert same(DecoderState.load(file, SMALL), state_of(1))  # a state file as any other
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {stat.S_IMODE(d.stat().st_mode) for d in (file.parent, file.parent.parent)} == {0o700}


def test_a_state_of_another_bundle_is_not_looked_at(tmp_path, files):
    saved(tmp_path, files)
    assert PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, "f" * 64).load(key_of(1)) is None


def assert_refused(files, file, caplog, removed=True, reason=""):
    """Hold that a file is refused with one warning, and counted, and that nothing is said when it is asked for again."""
    before = files.refused
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert files.load(key_of(1)) is None
        assert files.load(key_of(1)) is None
    assert files.refused == before + 1 and len(caplog.records) == 1
    assert str(file) in caplog.text and reason in caplog.text
    assert os.path.lexists(file) is not removed


def test_one_flipped_bit_anywhere_is_found(tmp_path, files):
    file = saved(tmp_path, files)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    assert b"conv" in whole[:head] and len(whole) == head + VALUES + 4
    for at in range(len(whole)):
        for bit in range(8) if at < head else (at % 8,):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            file.write_bytes(changed)
            assert files.load(key_of(1)) is None and not file.exists(), f"bit {bit} of byte {at}"
    file.write_bytes(whole)
    assert same(files.load(key_of(1)), state_of(1))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda file: file.write_bytes(b""), "0 bytes, expected"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes, expected"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "bytes, expected"),
        (lambda file: os.truncate(file, 1 << 40), "1099511627776 bytes, expected"),  # never read
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "altered"),
        (lambda file: file.write_bytes(b"\xff" * file.stat().st_size), "altered"),
        (lambda file: state_of(1).save(file), "bytes, expected"),
        (lambda file: file.with_name("other").replace(file), "altered"),  # a whole file of another key
    ],
)
def test_files_that_are_not_as_they_were_written_are_removed(tmp_path, files, caplog, break_it, reason):
    file = saved(tmp_path, files)
    saved(tmp_path, files, 2).rename(file.with_name("other"))
    break_it(file)
    assert_refused(files, file, caplog, reason=reason)
    files.save(key_of(1), state_of(1))
    assert same(files.load(key_of(1)), state_of(1))


def test_a_state_of_another_model_is_refused(tmp_path, files, caplog):
    file = saved(tmp_path, files)
    other = PrefixCacheDisk(tmp_path / "other", 1 << 20, MambaConfig(8, 2, 16, 8, 3, 2, 2), FINGERPRINT)  # as many bytes
    values = np.zeros((2, 8, 2), np.float32), np.zeros((2, 8, 3), np.float32)
    other.save(key_of(1), DecoderState(*values, 1))
    path_of(tmp_path / "other", 1).replace(file)
    assert_refused(files, file, caplog, reason="altered, or of another model")


def test_values_that_are_no_numbers_are_refused(tmp_path, files, caplog):
    for value in (np.nan, np.inf):
        state = state_of(1)
        state.ssm[1, 2, 1] = value
        files.save(key_of(1), state)
        assert_refused(files, path_of(tmp_path / "states", 1), caplog, reason="contains NaN or infinity")


def a_socket(file):
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(file.parent, os.O_RDONLY)  # a socket's path may have 107 characters
        try:
            one.bind(f"/proc/self/fd/{here}/{file.name}")
        finally:
            os.close(here)


@pytest.mark.parametrize(
    "put",
    [
        Path.mkdir,
        os.mkfifo,
        a_socket,
        lambda file: file.symlink_to(file.with_name("elsewhere")),
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to(file.name),
    ],
    ids=["directory", "pipe", "socket", "link", "link to a device", "link to itself"],
)
def test_what_is_no_file_is_refused_and_left_where_it_is(tmp_path, files, caplog, put):
    file = saved(tmp_path, files)
    file.rename(file.with_name("elsewhere"))
    put(file)
    kind = stat.S_IFMT(file.lstat().st_mode)
    assert_refused(files, file, caplog, removed=False, reason="left in place")
    files.save(key_of(1), state_of(1))
    assert stat.S_IFMT(file.lstat().st_mode) == kind and file.with_name("elsewhere").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path, files, caplog):
    file = saved(tmp_path, files)
    file.chmod(0)
    assert_refused(files, file, caplog, reason="Permission denied")


def test_a_file_of_a_failing_disk_is_refused(tmp_path, files, caplog, monkeypatch):
    file = saved(tmp_path, files)
    with monkeypatch.context() as patch:
        patch.setattr(PrefixCacheDisk, "_read", fails(errno.EIO))
        assert files.load(key_of(1)) is None
    assert "Input/output error" in caplog.text and files.refused == 1
    assert files.load(key_of(1)) is None and files.refused == 1 and not file.exists()


def fails(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(("call", "number"), [("replace", errno.ENOSPC), ("replace", errno.EROFS)])
def test_a_full_disk_is_one_warning_and_leaves_nothing(tmp_path, files, caplog, monkeypatch, call, number):
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(prefix_cache_disk.os, call, fails(number))
        files.save(key_of(1), state_of(1))
        files.save(key_of(2), state_of(2))
    assert len(caplog.records) == 1 and os.strerror(number) in caplog.text
    assert list((tmp_path / "states" / FINGERPRINT).iterdir()) == []
    assert same(PrefixCacheOf(files).kept(1), state_of(1))  # serving goes on
    caplog.clear()
    files.save(key_of(2), state_of(2))
    assert same(files.load(key_of(2)), state_of(2)) and not caplog.records


class PrefixCacheOf:
    def __init__(self, files):
        self.cache = PrefixCache(1 << 20, files)

    def kept(self, name):
        self.cache.keep(key_of(name), state_of(name), on_disk=True)
        found = self.cache.longest([key_of(name)])
        return None if found is None else found[1]


def test_a_file_that_may_not_grow_is_one_warning_and_leaves_nothing(tmp_path):
    program = f"""
import logging, resource, sys
from pathlib import Path
from tests.serve.test_prefix_cache import FINGERPRINT, SMALL, PrefixCacheDisk, key_of, same, state_of
files = PrefixCacheDisk(Path({str(tmp_path)!r}), 1 << 20, SMALL, FINGERPRINT)
logging.basicConfig(stream=sys.stdout, format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
files.save(key_of(1), state_of(1))
files.save(key_of(2), state_of(2))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sorted(file.name for file in Path({str(tmp_path)!r}).rglob("*.*")))
files.save(key_of(2), state_of(2))
assert same(files.load(key_of(2)), state_of(2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=MINI.parent.parent)
    said, left = done.stdout.splitlines()
    assert "File too large" in said and left == "[]"


def test_a_directory_that_vanishes_is_made_again(tmp_path, files):
    file = saved(tmp_path, files)
    file.unlink()
    file.parent.rmdir()
    file.parent.parent.rmdir()
    assert files.load(key_of(1)) is None and files.refused == 0
    saved(tmp_path, files)
    assert same(files.load(key_of(1)), state_of(1))


@pytest.mark.parametrize("limit", ["one", "three"])
def test_the_least_recently_used_files_of_all_bundles_are_given_up(tmp_path, limit):
    size, root = size_of_a_file(tmp_path), tmp_path / "states"
    older = PrefixCacheDisk(root, 1 << 20, SMALL, "a" * 16)
    for i, name in enumerate(("old", "older")):
        older.save(key_of(name), state_of(i))
        os.utime(path_of(root, name, "a" * 16), (1000 - i, 1000 - i))
    keep = {"one": 1, "three": 3}[limit]
    files = PrefixCacheDisk(root, (keep + 1) * size - 1, SMALL, FINGERPRINT)

    def names():
        return {file.stem for file in root.rglob("*.safetensors")}

    files.save(key_of(1), state_of(1))
    expected = {"one": [1], "three": ["old", "older", 1]}[limit]
    assert names() == {key_of(name).hex() for name in expected}
    os.utime(path_of(root, 1), (2000, 2000))
    files.save(key_of(2), state_of(2))
    os.utime(path_of(root, 2), (3000, 3000))
    assert names() == {key_of(name).hex() for name in {"one": [2], "three": ["old", 1, 2]}[limit]}
    if limit == "three":
        files.load(key_of(1))  # used, and so the last to go
        files.save(key_of(3), state_of(3))
        os.utime(path_of(root, 3), (4000, 4000))
        files.save(key_of(4), state_of(4))
        assert names() == {key_of(name).hex() for name in (1, 3, 4)}
        os.utime(path_of(root, 1), (500, 500))
        files.save(key_of(1), state_of(1))  # is there: used too
        files.save(key_of(5), state_of(5))
        assert names() == {key_of(name).hex() for name in (1, 4, 5)}


def test_only_files_of_ours_are_given_up(tmp_path):
    size, root = size_of_a_file(tmp_path), tmp_path / "states"
    files = PrefixCacheDisk(root, size, SMALL, FINGERPRINT)
    own, hexed = root / FINGERPRINT, "b" * 64
    outside = tmp_path / "outside" / f"{hexed}.safetensors"
    outside.parent.mkdir()
    strangers = [
        own / "notes.txt",
        own / f"{hexed}.bin",
        own / f"{hexed[1:]}.safetensors",
        root / f"{hexed}.safetensors",
        outside,
    ]
    strangers += [root / "photos" / f"{hexed}.safetensors", own / f"{hexed}.abcdefgh.part.txt", own / f"{hexed}.ABCDEFGH.part"]
    for file in strangers:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(10 * size))
        os.utime(file, (1, 1))
    (own / f"{hexed}.safetensors").symlink_to(outside)
    (root / ("c" * 16)).symlink_to(outside.parent, target_is_directory=True)
    for name in (1, 2):
        files.save(key_of(name), state_of(name))
        assert same(files.load(key_of(name)), state_of(name))
    assert not path_of(root, 1).exists()
    assert all(file.exists() for file in strangers) and (own / f"{hexed}.safetensors").is_symlink()


def test_a_write_that_was_cut_off_is_cleared_away_once_nobody_can_be_at_it(tmp_path):
    size, root = size_of_a_file(tmp_path), tmp_path / "states"
    files = PrefixCacheDisk(root, 3 * size, SMALL, FINGERPRINT)
    abandoned, at_work = (root / FINGERPRINT / f"{'d' * 64}.{name}.part" for name in ("abcd_123", "efgh4567"))
    for file in (abandoned, at_work):
        file.write_bytes(bytes(size))
    os.utime(abandoned, (1, 1))
    files.save(key_of(1), state_of(1))
    assert not abandoned.exists() and at_work.exists()
    files.save(key_of(2), state_of(2))
    files.save(key_of(3), state_of(3))  # what is being written counts, but is not given up
    assert at_work.exists() and sum(path_of(root, name).exists() for name in (1, 2, 3)) == 2


def test_what_cannot_be_removed_is_never_exceeded(tmp_path, caplog, monkeypatch):
    root = tmp_path / "states"
    files = PrefixCacheDisk(root, size_of_a_file(tmp_path), SMALL, FINGERPRINT)
    files.save(key_of(1), state_of(1))
    monkeypatch.setattr(Path, "unlink", fails(errno.EPERM))
    files.save(key_of(2), state_of(2))
    assert "no further file can be removed" in caplog.text and not path_of(root, 2).exists()


def test_files_that_others_remove_meanwhile_are_no_error(tmp_path, monkeypatch, caplog):
    size, root = size_of_a_file(tmp_path), tmp_path / "states"
    files = PrefixCacheDisk(root, 2 * size, SMALL, FINGERPRINT)
    for name in (1, 2):
        files.save(key_of(name), state_of(name))
    scandir = os.scandir

    def and_then_they_are_gone(directory):
        entries = scandir(directory)
        found = list(entries)
        for entry in found:
            if entry.name.endswith(".safetensors"):
                Path(entry.path).unlink(missing_ok=True)

        class Entries(list):
            def __enter__(self):
                return self

            def __exit__(self, *_):
                entries.close()

        return Entries(found)

    monkeypatch.setattr(prefix_cache_disk.os, "scandir", and_then_they_are_gone)
    files.save(key_of(3), state_of(3))
    assert path_of(root, 3).exists() and not caplog.records


def test_directories_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/states")):
        with pytest.raises(InputError, match="give a directory that you can write to"):
            PrefixCacheDisk(directory, 1 << 20, SMALL, FINGERPRINT)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / FINGERPRINT).symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(InputError, match="is a link; remove it"):
        PrefixCacheDisk(tmp_path / "linked", 1 << 20, SMALL, FINGERPRINT)


@pytest.mark.parametrize("mode", [0o664, 0o606, 0o622])
def test_a_file_that_others_may_write_is_not_believed(tmp_path, files, caplog, mode):
    file = saved(tmp_path, files)
    file.chmod(mode)
    assert_refused(files, file, caplog, reason="others may write to it (mode 0")


@pytest.mark.parametrize("below", [".", FINGERPRINT])
@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_refused(tmp_path, files, caplog, below, mode):
    file = saved(tmp_path, files)
    (tmp_path / "states" / below).chmod(mode)
    with pytest.raises(InputError, match=r"others may write to it \(mode \d+\); chmod go-w"):
        PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, FINGERPRINT)
    assert files.load(key_of(1)) is None and files.refused == 1  # it was changed under a running server
    files.save(key_of(2), state_of(2))
    assert not path_of(tmp_path / "states", 2).exists() and "others may write to it" in caplog.text
    assert file.exists()  # it may be another's


def test_what_belongs_to_others_is_not_believed(tmp_path, files, monkeypatch, caplog):
    file = saved(tmp_path, files)
    monkeypatch.setattr(ownership, "_trusted_users", lambda: {54321})
    with pytest.raises(InputError, match="belongs to user"):
        PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, FINGERPRINT)
    assert files.load(key_of(1)) is None
    with pytest.raises(PermissionError, match="belongs to user"):
        ownership.read_trusted(file)


@pytest.mark.parametrize("n_tokens", [-1, -(1 << 31), 101])
def test_a_state_of_more_tokens_than_the_model_reads_is_refused(tmp_path, caplog, n_tokens):
    files = PrefixCacheDisk(tmp_path / "states", 1 << 20, SMALL, FINGERPRINT, most_tokens=100)
    state = state_of(1)
    state.n_tokens = n_tokens
    files.save(key_of(1), state)
    if n_tokens < 0:
        with pytest.raises(InputError, match=f"has read {n_tokens} tokens"):
            DecoderState.load(path_of(tmp_path / "states", 1), SMALL)
    assert_refused(files, path_of(tmp_path / "states", 1), caplog, reason=f"n_tokens is {n_tokens}, expected at most 100")


def test_a_directory_that_may_only_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_cache_disk.tempfile, "TemporaryFile", fails(errno.EROFS))
    with pytest.raises(InputError, match="Read-only file system"):
        PrefixCacheDisk(tmp_path, 1 << 20, SMALL, FINGERPRINT)


def test_a_limit_below_one_state_is_refused(tmp_path):
    size = size_of_a_file(tmp_path)
    PrefixCacheDisk(tmp_path, size, SMALL, FINGERPRINT)
    with pytest.raises(InputError, match=f"the limit is {size - 1} bytes, but one state of this model takes {size}"):
        PrefixCacheDisk(tmp_path, size - 1, SMALL, FINGERPRINT)


# Memory over files


def test_the_longest_prefix_is_taken_from_wherever_it_is(tmp_path, files):
    cache, keys = PrefixCache(1 << 20, files), [key_of(name) for name in range(4)]
    cache.keep(keys[1], state_of(1))
    files.save(keys[2], state_of(2))
    files.save(keys[0], state_of(0))
    for index, hits in ((2, (0, 1)), (2, (1, 1))):  # the second time it is in memory
        found = cache.longest(keys)
        assert found[0] == index and same(found[1], state_of(index))
        assert (cache.counts.hits_memory, cache.counts.hits_disk) == hits
    assert cache.longest(keys[:2])[0] == 1 and cache.longest(keys[:1])[0] == 0
    assert (cache.counts.hits_memory, cache.counts.hits_disk, cache.counts.misses) == (2, 2, 0)
    assert cache.longest(keys[3:]) is None and cache.longest([]) is None and cache.counts.misses == 2


def test_a_refused_file_is_a_miss_and_counted(tmp_path, files):
    cache = PrefixCache(1 << 20, files)
    saved(tmp_path, files).write_bytes(b"")
    assert cache.longest([key_of(1)]) is None
    assert (cache.counts.misses, cache.counts.refused_files, cache.counts.hits_disk) == (1, 1, 0)


def test_without_memory_the_files_do(files):
    cache = PrefixCache(0, files)
    cache.keep(key_of(1), state_of(1), on_disk=True)
    cache.keep(key_of(2), state_of(2))
    found = cache.longest([key_of(1), key_of(2)])
    assert found[0] == 0 and same(found[1], state_of(1)) and len(cache) == cache.size_bytes == 0


def test_a_state_in_memory_can_be_put_on_disk_later(tmp_path, files):
    cache = PrefixCache(1 << 20, files)
    cache.keep(key_of(1), state_of(1))
    assert not path_of(tmp_path / "states", 1).exists()
    cache.keep(key_of(1), state_of(1), on_disk=True)
    assert same(files.load(key_of(1)), state_of(1))
