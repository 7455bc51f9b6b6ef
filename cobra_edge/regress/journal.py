"""The journal of a run: each compared line as JSON as soon as it is known, so that an interrupted run goes on where it was.

`lines.partial.jsonl` in the report's directory; its first line says what was measured, and one of another build, baseline,
suite or runtime is begun anew. When the run is through it is called `lines.jsonl`. A run holds a lock on its report's
directory, so that no second one writes into the same journal.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import filelock
import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json
from .line_metrics import LineMetrics

PARTIAL, WHOLE = "lines.partial.jsonl", "lines.jsonl"
log = logging.getLogger(__name__)

_LOCK, _HOLDER = ".lines.lock", ".lines.lock.pid"  # apart: whoever tries the lock empties its file


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fingerprint: str


def fingerprint_of(*parts: str) -> str:
    """Return a hash over what a run depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Journal:
    """An opened journal.

    Attributes:
        done: lines that an earlier run measured, in order.
    """

    def __init__(self, done: list[LineMetrics], stream: BinaryIO | None) -> None:
        """Wrap what was read, and where to write; None keeps nothing."""
        self.done, self._stream = done, stream

    def write(self, line: LineMetrics) -> None:
        """Add a line; it is in the file when this returns."""
        if self._stream is not None:
            self._stream.write(msgspec.json.encode(line) + b"\n")
            self._stream.flush()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the report of a directory that exists, for as long as a run writes there; a process that dies holds nothing.

    Raises:
        InputError: another run holds it; its process is named.
    """
    lock = filelock.FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(
            f"{directory}: {_holder(directory)} writes its report there; wait until it ends, or give another --report"
        ) from error
    except (OSError, NotImplementedError) as error:  # file systems of a network may have no locks
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise InputError(f"{directory}: cannot be locked ({error}); give another --report") from error
        log.warning("%s: this file system has no locks (%s); start no second run into it", directory, error)
    try:
        with suppress(OSError):  # it is for the message alone
            (directory / _HOLDER).write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        with suppress(OSError):
            (directory / _HOLDER).unlink()
        lock.release()


def _holder(directory: Path) -> str:
    try:
        return f"another run (process {int((directory / _HOLDER).read_bytes()[:20])})"
    except (OSError, ValueError):  # it has the lock and has not said so yet
        return "another run"


@contextmanager
def journal(directory: Path | None, fingerprint: str) -> Iterator[Journal]:
    """Open the journal in a directory that exists; without one nothing is kept. It gets its final name when all went well."""
    if directory is None:
        yield Journal([], None)
        return
    file = directory / PARTIAL
    done, end = _read(file, fingerprint)
    with file.open("r+b" if end else "wb") as stream:
        stream.truncate(end)  # a line that was cut short, or a journal of something else
        stream.seek(end)
        if not end:
            stream.write(msgspec.json.encode(_Header(fingerprint)) + b"\n")
        yield Journal(done, stream)
        stream.flush()
    os.replace(file, directory / WHOLE)


def _read(file: Path, fingerprint: str) -> tuple[list[LineMetrics], int]:
    """Return the whole lines of a journal of this run, and where they end; 0 where it is not one."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    first, newline, rest = data.partition(b"\n")
    try:
        header = parse_json(first, _Header)
    except ParseError:
        return [], 0
    if header.fingerprint != fingerprint or not newline:
        return [], 0
    done, end = list[LineMetrics](), len(first) + 1
    for text in rest.split(b"\n")[:-1]:
        try:
            done.append(parse_json(text, LineMetrics))
        except ParseError:
            break
        end += len(text) + 1
    return done, end
