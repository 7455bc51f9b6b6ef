"""Files that were found whole before, remembered outside the bundle.

Hashing costs a second for each gigabyte, every time a bundle is opened. A file whose content once had the hash its manifest
names, and which the kernel has not seen changed since, is taken at its word: the same device, inode, size, mtime and ctime.
The ctime cannot be set by a program, so content that was changed under an old mtime is noticed. The user's cache directory
holds one entry a path; whatever is wrong with it is a reason to hash, never a reason to fail.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path

import msgspec
import platformdirs

from ..environment.threads import default_threads
from ..files.ownership import read_trusted

log = logging.getLogger(__name__)

# Timestamps move in steps of up to two seconds (FAT; others some milliseconds), and a second change within one step leaves no
# trace in them. As in git's index, a file that was changed so shortly before it was hashed is not remembered.
_SETTLED_NS = 2_000_000_000
_ENTRY_LIMIT_BYTES = 4096
_CHUNK_BYTES = 1 << 20
_NEVER = threading.Event()


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as it was when its content had that hash."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    @classmethod
    def of(cls, stat: os.stat_result, sha256: str) -> _Entry:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256)


def content_sha256(stream: FileIO, stop: threading.Event = _NEVER) -> str:
    """Return the hash of what an unbuffered file holds from here on.

    Raises:
        CancelledError: `stop` was set before the end.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    while n := stream.readinto(buffer):
        if stop.is_set():
            raise CancelledError
        digest.update(buffer[:n])
    return digest.hexdigest()


def first_changed(files: Sequence[tuple[Path, str]], *, thorough: bool = False) -> Path | None:
    """Return the first file whose content has not the sha256 beside it, or None where all have.

    Args:
        files: paths with the hashes expected; they are hashed side by side.
        thorough: hash those too that are remembered.

    Raises:
        OSError: a file cannot be read; of several that went wrong in some way, the first is reported.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(len(files), default_threads()))) as pool:
        try:
            for (file, _), whole in zip(files, pool.map(lambda f: _is_whole(f[0], f[1], thorough, stop), files), strict=True):
                if not whole:
                    return file
        finally:
            stop.set()  # an interruption, or a file that is not whole, does not wait until gigabytes of others are hashed
    return None


def _is_whole(file: Path, sha256: str, thorough: bool, stop: threading.Event) -> bool:
    place = _place_of(file)
    with file.open("rb", buffering=0) as stream:
        began_ns, before = time.time_ns(), os.fstat(stream.fileno())
        expected = _Entry.of(before, sha256)
        if not thorough and _recall(place) == expected:
            return True
        got, after = content_sha256(stream, stop), os.fstat(stream.fileno())
    if got != sha256:
        _forget(place)  # a failing disk changes content without a trace in the timestamps
        return False
    unchanged = expected == _Entry.of(after, sha256)
    if unchanged and began_ns - max(before.st_mtime_ns, before.st_ctime_ns) >= _SETTLED_NS:
        _remember(place, expected)
    return True


def _place_of(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return platformdirs.user_cache_path("cobra_edge") / "hashes" / f"{name}.json"


def _recall(place: Path) -> _Entry | None:
    """Return the entry, or None where there is none of ours that can be read."""
    try:
        # Anybody may write where a cache is shared.
        return msgspec.json.decode(read_trusted(place, _ENTRY_LIMIT_BYTES), type=_Entry)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _remember(place: Path, entry: _Entry) -> None:
    """Write the entry in one step: another process reads the old one or the new one."""
    if not place.is_absolute():  # a user without a home: "~" would become a directory here
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(msgspec.json.encode(entry))
            os.replace(draft, place)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        log.debug("not remembered as whole: %s", error)


def _forget(place: Path) -> None:
    with suppress(OSError):
        place.unlink()
