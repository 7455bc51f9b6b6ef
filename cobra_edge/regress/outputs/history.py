"""Drift over commits: a file of JSON lines, one a run, that grows at its end."""

from __future__ import annotations

import os
from pathlib import Path

import filelock
import msgspec

from ...errors import InputError, MachineError
from ..report import Figure, Report
from .rows import all_figures

HISTORY_VERSION = 1
_LIMIT_BYTES = 256 << 20
_LOCK_SECONDS = 60.0


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

    Raises:
        InputError: the file cannot be written, or its last line is broken off; nothing is appended then.
        MachineError: the disk is full (what was written of the line is taken back), or another process holds the file.
    """
    line = msgspec.json.encode(entry_of(report)) + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=_LOCK_SECONDS):
            lead = b"" if _ends_whole(file) else b"\n"
            _write_at_end(file, lead + line)
    except filelock.Timeout as error:
        raise MachineError(f"{file}: another process has held {file}.lock for a minute; end it and try again") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error}); give the history another path") from error


def _ends_whole(file: Path) -> bool:
    """Tell whether the last line has its end; raises InputError where it is also no entry."""
    if not file.exists():
        return True
    content = file.read_bytes()
    if not content or content.endswith(b"\n"):
        return True
    number = content.count(b"\n") + 1
    try:
        _decoded(file, number, content.rpartition(b"\n")[2])
    except InputError as error:
        raise InputError(f"{error}; it was broken off, perhaps by a crash: remove line {number} and append again") from error
    return False


def _write_at_end(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, content) != len(content):
            os.ftruncate(descriptor, size)
            raise MachineError(f"{file}: no room for {len(content)} bytes; free some of the disk and append again")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_history(file: Path) -> list[Entry]:
    """Read every entry, oldest first as the file has them.

    Raises:
        InputError: unreadable, empty, or a line (its number is named) that is no entry.
    """
    try:
        if file.stat().st_size > _LIMIT_BYTES:
            raise InputError(f"{file}: {file.stat().st_size} bytes, too large for a history")
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); expected the JSON lines of a history") from error
    entries = [_decoded(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise InputError(f"{file}: no entries; a run with --history adds one")
    return entries


def _decoded(file: Path, number: int, line: bytes) -> Entry:
    try:
        entry = msgspec.json.decode(line, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}, line {number}: {error}; expected an entry of a history") from error
    if entry.history_version != HISTORY_VERSION:
        got = entry.history_version
        raise InputError(f"{file}, line {number}: history_version is {got}, this cobra_edge reads {HISTORY_VERSION}")
    return entry
