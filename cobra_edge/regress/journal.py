"""The journal of a run: the metrics of each line as JSON, written as soon as they are known, for resuming.

`lines.partial.jsonl` in the directory of the report. The first line identifies what is measured; a journal of another build,
baseline, suite or runtime is overwritten. A complete journal is renamed to `lines.jsonl`. A run holds a lock on the directory,
so that no second run writes into it.
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

_LOCK, _HOLDER = ".lines.lock", ".lines.lock.pid"  # separate: trying the lock truncates its file


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fingerprint: str


def fingerprint_of(*parts: str) -> str:
    """Return a hash over everything that a run depends on."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Journal:
    """An opened journal.

    Attributes:
        done: metrics of the lines that an earlier run measured, in order.
    """

    def __init__(self, done: list[LineMetrics], stream: BinaryIO | None) -> None:
        """Wrap the lines read, and the stream to write to; None writes nothing."""
        self.done, self._stream = done, stream

    def write(self, line: LineMetrics) -> None:
        """Append a line; it is in the file when this returns."""
        if self._stream is not None:
            self._stream.write(msgspec.json.encode(line) + b"\n")
            self._stream.flush()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock an existing directory while a run writes its report there; the lock ends with the process.

    Raises:
        InputError: another run holds the lock; the message has its process id.
    """
    lock = filelock.FileLock(directory / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(
            f"{directory}: {_holder(directory)} writes its report there; wait until it ends, or give another --report"
        ) from error
    except (OSError, NotImplementedError) as error:  # network file systems may not support locks
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise InputError(f"{directory}: cannot be locked ({error}); give another --report") from error
        log.warning(
            "%s: this file system does not support locks (%s); do not start a second run with this --report", directory, error
        )
    try:
        with suppress(OSError):  # only for the message
            (directory / _HOLDER).write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        with suppress(OSError):
            (directory / _HOLDER).unlink()
        lock.release()


def _holder(directory: Path) -> str:
    try:
        return f"another run (process {int((directory / _HOLDER).read_bytes()[:20])})"
    except (OSError, ValueError):  # it has the lock and has not written its id yet
        return "another run"


@contextmanager
def journal(directory: Path | None, fingerprint: str) -> Iterator[Journal]:
    """Open the journal of an existing directory, or one that keeps nothing; it gets its final name if no error is raised."""
    if directory is None:
        yield Journal([], None)
        return
    file = directory / PARTIAL
    done, end = _read(file, fingerprint)
    with file.open("r+b" if end else "wb") as stream:
        stream.truncate(end)  # a truncated line, or a journal of another run
        stream.seek(end)
        if not end:
            stream.write(msgspec.json.encode(_Header(fingerprint)) + b"\n")
        yield Journal(done, stream)
        stream.flush()
    os.replace(file, directory / WHOLE)


def read_lines(file: Path) -> list[LineMetrics]:
    """Return the metrics of all lines of a finished run, in order. Raises InputError: missing, or not such a file."""
    try:
        with file.open("rb") as stream:
            parse_json(stream.readline(), _Header)
            return [parse_json(text, LineMetrics) for text in stream]
    except (OSError, ParseError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected the {WHOLE} of a finished `regress --report`") from error


def _read(file: Path, fingerprint: str) -> tuple[list[LineMetrics], int]:
    """Return the complete lines of a journal of this run, and the offset of their end; 0 if it is of another run."""
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
