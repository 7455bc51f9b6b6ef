"""Drift over commits: a file of JSON lines, one a run, that grows at its end."""

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
_BEGINNING = b'{"history_version":'
_TORN = "%s: its last line, %d, was broken off by a crash or a full disk; "

log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run.

    Attributes:
        time: when it began, ISO 8601, UTC.
        suite: the sha256 of what was asked.
        decoder, vision, activations: what ran it.
        passed: None where nothing was judged.
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
    """Return what the history keeps of a report."""
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
    """Append one line in a single write, one process at a time; the directory is made where it is missing.

    A last line that was broken off, by a crash or a full disk, is removed first, with a warning: no run is lost by that, as it
    was never whole.

    Raises:
        InputError: the file cannot be written.
        MachineError: the disk is full (what was written of the line is taken back), or another process holds the file.
    """
    line = msgspec.json.encode(entry_of(report)) + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            content = file.read_bytes() if file.exists() else b""
            if torn := _torn(content):
                log.warning(_TORN + "removed", file, content.count(b"\n") + 1)
                os.truncate(file, len(content) - len(torn))
            lead = b"" if torn or not content or content.endswith(b"\n") else b"\n"
            _write_at_end(file, lead + line)
    except filelock.Timeout as error:
        raise MachineError(f"{file}: another process has held {file}.lock for a minute; end it and try again") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise MachineError(f"{file}: no room for {len(line)} bytes; free some of the disk and append again") from error
        raise InputError(f"{file}: cannot be written ({error}); give the history another path") from error


def _torn(content: bytes) -> bytes:
    """Return the last line where it begins as an entry (or holds zeros, as after a power cut) and is none, else nothing."""
    last = content.rpartition(b"\n")[2]
    if not last.strip() or (last.strip(b"\0") and not last.startswith(_BEGINNING[: len(last)])):
        return b""
    try:
        parse_json(last, Entry)
    except ParseError:
        return last
    return b""


def _write_at_end(file: Path, content: bytes) -> None:
    """Write everything or nothing. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)  # some file systems say here only that there was no room
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def check_history(file: Path) -> None:
    """Find before anything is measured what would keep `append_history` from appending. A new or an empty file is a history.

    Raises:
        InputError: unreadable, or a line (its number is named) that is no entry.
    """
    if file.exists():
        _entries(file)


def read_history(file: Path) -> list[Entry]:
    """Read every entry, oldest first as the file has them; a last line that was broken off is passed over with a warning.

    Raises:
        InputError: unreadable, empty, or a line (its number is named) that is no entry.
    """
    entries = _entries(file)
    if not entries:
        raise InputError(f"{file}: no entries; a run with --history adds one")
    return entries


def _entries(file: Path) -> list[Entry]:
    try:
        if file.stat().st_size > _LIMIT_BYTES:
            raise InputError(f"{file}: {file.stat().st_size} bytes, too large for a history")
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); expected the JSON lines of a history") from error
    lines = without_mark(content).split(b"\n")
    if _torn(content):
        log.warning(_TORN + "passed over", file, len(lines))
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
