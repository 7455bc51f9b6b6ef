"""The journal of a run: each compared line as JSON as soon as it is known, so that an interrupted run goes on where it was.

`lines.partial.jsonl` in the report's directory; its first line says what was measured, and one of another build, baseline,
suite or runtime is begun anew. When the run is through it is called `lines.jsonl`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from .compared import ComparedLine

PARTIAL, WHOLE = "lines.partial.jsonl", "lines.jsonl"


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

    def __init__(self, done: list[ComparedLine], stream: BinaryIO | None) -> None:
        """Wrap what was read, and where to write; None keeps nothing."""
        self.done, self._stream = done, stream

    def write(self, line: ComparedLine) -> None:
        """Add a line; it is in the file when this returns."""
        if self._stream is not None:
            self._stream.write(msgspec.json.encode(line) + b"\n")
            self._stream.flush()


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


def _read(file: Path, fingerprint: str) -> tuple[list[ComparedLine], int]:
    """Return the whole lines of a journal of this run, and where they end; 0 where it is not one."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    first, newline, rest = data.partition(b"\n")
    try:
        header = msgspec.json.decode(first, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return [], 0
    if header.fingerprint != fingerprint or not newline:
        return [], 0
    done, end = list[ComparedLine](), len(first) + 1
    for text in rest.split(b"\n")[:-1]:
        try:
            done.append(msgspec.json.decode(text, type=ComparedLine))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            break
        end += len(text) + 1
    return done, end
