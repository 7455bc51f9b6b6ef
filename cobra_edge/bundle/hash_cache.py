"""Cache of verified file hashes, outside the bundle.

Hashing takes a second per gigabyte, every time a bundle is opened. A file that once had the hash of its manifest is not hashed
again while its device, inode, size, mtime and ctime are unchanged. Programs cannot set the ctime, so modified content with an
old mtime is detected. The user's cache directory has one entry per path; an entry that is missing or damaged means that the
file is hashed, never that opening fails.
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

# Timestamps have a resolution of up to two seconds (FAT; others some milliseconds), and a second change within it leaves no
# trace. As in git's index, a file that was modified so recently is not cached.
_SETTLED_NS = 2_000_000_000
_ENTRY_LIMIT_BYTES = 4096
_CHUNK_BYTES = 1 << 20
_NEVER = threading.Event()


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metadata of a file when its content had that hash."""

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
    """Return the sha256 of an unbuffered file from the current position on.

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
    """Return the first file whose content does not have the expected sha256, or None.

    Args:
        files: paths with expected hashes; hashed in parallel.
        thorough: ignore the cache.

    Raises:
        OSError: a file cannot be read. Of several failures the first is reported.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(len(files), default_threads()))) as pool:
        try:
            for (file, _), whole in zip(files, pool.map(lambda f: _is_whole(f[0], f[1], thorough, stop), files), strict=True):
                if not whole:
                    return file
        finally:
            stop.set()  # after an interruption or a mismatch, stop hashing the other files
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
        _forget(place)  # a failing disk changes content without touching timestamps
        return False
    unchanged = expected == _Entry.of(after, sha256)
    if unchanged and began_ns - max(before.st_mtime_ns, before.st_ctime_ns) >= _SETTLED_NS:
        _remember(place, expected)
    return True


def _place_of(file: Path) -> Path:
    name = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()
    return platformdirs.user_cache_path("cobra_edge") / "hashes" / f"{name}.json"


def _recall(place: Path) -> _Entry | None:
    """Return the entry, or None if there is no trusted, readable one."""
    try:
        # A shared cache may be writable by others.
        return msgspec.json.decode(read_trusted(place, _ENTRY_LIMIT_BYTES), type=_Entry)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _remember(place: Path, entry: _Entry) -> None:
    """Write the entry atomically."""
    if not place.is_absolute():  # a user without a home: would create a directory "~" here
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
        log.debug("hash not cached: %s", error)


def _forget(place: Path) -> None:
    with suppress(OSError):
        place.unlink()
