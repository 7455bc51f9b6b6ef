"""Drift over commits: a file of JSON lines, one per run, to which each run appends."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import filelock
import msgspec

from ...errors import InputError, MachineError
from ...files.parsing import ParseError, parse_json, without_mark
from ..report import Figure, Report
from .rows import all_figures

HISTORY_VERSION = 1
_LIMIT_BYTES = 256 << 20
_LOCK_SECONDS = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PREFIX = b'{"history_version":'
_TRUNCATED = "%s: the last line, %d, was truncated by a crash or a full disk; "

log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run.

    Attributes:
        time: start of the run, ISO 8601, UTC.
        suite: sha256 of the suite.
        decoder, vision, activations: as in the report's runtime.
        passed: None without a budget.
    """

    history_version: int
    time: str
    commit: str | None
    build: str
    scheme: str
    target: str
    fingerprint: str
    model: str
    suite: str
    baseline: str
    decoder: str
    vision: str | None
    activations: str
    measures: dict[str, Figure]
    passed: bool | None


def entry_of(report: Report) -> Entry:
    """Return the history entry of a report."""
    build, runtime = report.build, report.runtime
    return Entry(
        HISTORY_VERSION,
        report.times.began,
        report.commit,
        build.name,
        build.scheme,
        build.target,
        build.fingerprint,
        build.model,
        report.suite.sha256,
        report.baseline.name,
        runtime.decoder,
        runtime.vision,
        runtime.activations,
        all_figures(report),
        report.passed if report.verdicts else None,
    )


def append_history(file: Path, report: Report) -> None:
    """Append one line in a single write, under a lock; a missing directory is created.

    A last line that was truncated by a crash or a full disk is removed first, with a warning.

    Raises:
        InputError: the file cannot be written.
        MachineError: the disk is full (a partly written line is removed), or another process holds the lock.
    """
    line = msgspec.json.encode(entry_of(report)) + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            content = file.read_bytes() if file.exists() else b""
            if truncated := _truncated(content):
                log.warning(_TRUNCATED + "removed", file, content.count(b"\n") + 1)
                os.truncate(file, len(content) - len(truncated))
            lead = b"" if truncated or not content or content.endswith(b"\n") else b"\n"
            _write_at_end(file, lead + line)
    except filelock.Timeout as error:
        raise MachineError(
            f"{file}: another process has held {file}.lock for a minute; wait for it, or end it, and try again"
        ) from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise MachineError(f"{file}: no room for {len(line)} bytes; free disk space and run again") from error
        raise InputError(f"{file}: cannot be written ({error}); give the history another path") from error


def _truncated(content: bytes) -> bytes:
    """Return the last line if it is a truncated entry (or zeros, as after a power cut), otherwise nothing."""
    last = content.rpartition(b"\n")[2]
    if not last.strip() or (last.strip(b"\0") and not last.startswith(_PREFIX[: len(last)])):
        return b""
    try:
        parse_json(last, Entry)
    except ParseError:
        return last
    return b""


def _write_at_end(file: Path, content: bytes) -> None:
    """Append everything or nothing. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)  # some file systems report a full disk only here
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def check_history(file: Path) -> None:
    """Check, before anything is measured, that `append_history` can append; a missing or an empty file is valid.

    Raises:
        InputError: unreadable, or an invalid line; the message names its number.
    """
    if file.exists():
        _entries(file)


def read_history(file: Path) -> list[Entry]:
    """Read all entries in the order of the file; a truncated last line is ignored with a warning.

    Raises:
        InputError: unreadable, empty, or an invalid line; the message names its number.
    """
    entries = _entries(file)
    if not entries:
        raise InputError(f"{file}: the history has no entries; run regress with --history to append one")
    return entries


def _entries(file: Path) -> list[Entry]:
    try:
        if file.stat().st_size > _LIMIT_BYTES:
            raise InputError(f"{file}: {file.stat().st_size} bytes, too large for a history")
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); expected a history (JSON lines)") from error
    lines = without_mark(content).split(b"\n")
    if _truncated(content):
        log.warning(_TRUNCATED + "ignored", file, len(lines))
        lines.pop()
    return [_decoded(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _decoded(file: Path, number: int, line: bytes) -> Entry:
    try:
        entry = parse_json(line, Entry)
    except ParseError as error:
        raise InputError(f"{file}, line {number}: {error}; expected an entry of a history") from error
    if entry.history_version != HISTORY_VERSION:
        got = entry.history_version
        raise InputError(f"{file}, line {number}: history_version is {got}, this cobra_edge reads {HISTORY_VERSION}")
    return entry
