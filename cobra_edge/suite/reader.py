"""Suites: JSON lines, each a question with its answer and how replies to it are scored; image paths relative to the file."""

from __future__ import annotations

import itertools
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..errors import InputError
from ..files.parsing import ParseError, parse_json, without_mark
from ..files.staging import staged_file
from ..formats.package_data import MINI
from ..inputs.text import given_answer
from ..terminal.suggestions import near_matches
from .line import Line
from .scoring import METRICS

HELDOUT, CALIBRATION = MINI / "heldout.jsonl", MINI / "calibration.jsonl"
LONGEST_LINE_BYTES = 1 << 20


class BadLine(msgspec.Struct, frozen=True):
    """A line that was passed over: its number in the file, from 1, and why."""

    number: int
    reason: str


def flaw_of(line: Line) -> str | None:
    """Return what is wrong with a line, None where nothing is; whether its image is there is not looked at."""
    for field in ("prompt", "answer", "task"):
        if not getattr(line, field).strip():
            return f"{field} is empty; expected text"
    if line.metric not in METRICS:
        return f"metric {line.metric!r} is unknown{near_matches(line.metric, METRICS)}"
    return METRICS[line.metric].refuses(line)


def read_suite(file: Path, *, bad: list[BadLine] | None = None) -> list[Line]:
    """Read every line; see `numbered_lines`."""
    return [line for _, line in numbered_lines(file, bad=bad)]


def numbered_lines(file: Path, *, bad: list[BadLine] | None = None) -> list[tuple[int, Line]]:
    """Read every line, with its number in the file, from 1.

    Args:
        file: JSON lines, none longer than 1 MiB.
        bad: where a list is given, lines that are not what they should be are appended to it and passed over.

    Raises:
        InputError: unreadable, empty, no line that is usable, or, where `bad` is None, a line that is not what it should be
            (its number is named).
    """
    lines, passed_over = [], list[BadLine]()
    try:
        with file.open("rb") as stream:
            for number, text in enumerate(_raw_lines(stream), 1):
                found = _line_of(text, file.parent) if without_mark(text).strip() else None
                if isinstance(found, Line):
                    lines.append((number, found))
                elif found is not None and bad is None:
                    raise InputError(f"{file}, line {number}: {found}")
                elif found is not None:
                    passed_over.append(BadLine(number, found))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); expected JSON lines") from error
    if bad is not None:
        bad.extend(passed_over)
    if not lines and passed_over:
        first = passed_over[0]
        raise InputError(f"{file}: none of its {len(passed_over)} lines is usable; line {first.number}: {first.reason}")
    if not lines:
        raise InputError(f"{file}: no lines; expected at least one question")
    return lines


def _raw_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of one that is too long only a start, which is too long too."""
    while text := stream.readline(LONGEST_LINE_BYTES + 1):
        rest = text
        while not rest.endswith(b"\n") and (rest := stream.readline(LONGEST_LINE_BYTES)):
            pass
        yield text


def _line_of(text: bytes, directory: Path) -> Line | str:
    """Return the line, or what is wrong with it."""
    if len(text) > LONGEST_LINE_BYTES:
        return f"longer than {LONGEST_LINE_BYTES} bytes; expected one question a line"
    try:
        line = parse_json(text, Line)
    except ParseError as error:
        return str(error)
    line = msgspec.structs.replace(line, answer=given_answer(line.answer))
    flaw = flaw_of(line)
    if flaw is None and line.image is not None:
        line = msgspec.structs.replace(line, image=name_on_disk(directory, line.image))
        return missing_image(directory, line.image or "") or line
    return flaw or line


def name_on_disk(directory: Path, name: str) -> str:
    """Return a file's name as the disk has it: macOS writes é as e and an accent, others as one letter. Unfound, as it came."""
    path, parts = os.fspath(directory), list[str]()
    for part in name.split("/"):
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        parts.append(next((form for form in forms if os.path.lexists(os.path.join(path, form))), part))
        path = os.path.join(path, parts[-1])
    return "/".join(parts)


def missing_image(directory: Path, image: str) -> str | None:
    """Return why an image cannot be read, None where it is a file."""
    path = os.path.join(directory, image)  # these functions take any name, where pathlib's raise for some
    if os.path.isfile(path):
        return None
    if os.path.exists(path):
        return f"image {image} is not a regular file"
    return f"image {image} is not there; image paths start at {directory}"


def write_suite(file: Path, lines: Iterable[Line], *, force: bool = True) -> int:
    """Write lines, in the place of the file as a whole, and return how many; its directory is made where it is missing.

    Raises:
        InputError: no lines, or one that `read_suite` would refuse for more than its image; as `staging.staged_file` too.
    """
    written = 0
    with staged_file(file, force=force) as staged, staged.open("wb") as stream:
        for written, line in enumerate(lines, 1):
            text, flaw = msgspec.json.encode(line) + b"\n", flaw_of(line)
            if len(text) > LONGEST_LINE_BYTES:
                flaw = f"longer than {LONGEST_LINE_BYTES} bytes"
            if flaw is not None:
                raise InputError(f"{file}, line {written}: {flaw}")
            stream.write(text)
        if not written:
            raise InputError(f"{file}: no lines to write; expected at least one question")
    return written


def images_of(suite: Path) -> list[Path]:
    """Return every image of a suite once, in order. Raises InputError as `read_suite` does."""
    return [suite.parent / name for name in dict.fromkeys(line.image for line in read_suite(suite)) if name is not None]


def spread(lines: list[Line], wanted: int) -> list[Line]:
    """Return `wanted` lines, as many of each task as of the others, spread evenly over each task's own."""
    wanted, by_task = min(wanted, len(lines)), defaultdict[str, list[Line]](list)
    for line in lines:
        by_task[line.task].append(line)
    counts = dict.fromkeys(by_task, 0)
    for task in itertools.islice(itertools.cycle(by_task), wanted * len(by_task)):
        if sum(counts.values()) < wanted and counts[task] < len(by_task[task]):
            counts[task] += 1
    return [of[i * len(of) // counts[task]] for task, of in by_task.items() for i in range(counts[task])]
