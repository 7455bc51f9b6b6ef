"""Read and write suites: JSON lines, each a prompt with its answer and a metric; image paths are relative to the file."""

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
MORE_CALIBRATION = MINI / "calibration-more.jsonl"  # further images, for methods that gain by them
LONGEST_LINE_BYTES = 1 << 20
FEWEST_IMAGES = 2  # of a suite that is to be judged: an interval is over images
_UNNAMED_TASK = "other"


class BadLine(msgspec.Struct, frozen=True):
    """A skipped line: its number in the file, from 1, and the reason."""

    number: int
    reason: str


def flaw_of(line: Line, *, answered: bool = True) -> str | None:
    """Return what is wrong with a line, or None; whether its image exists is not checked.

    Args:
        line: normalised.
        answered: whether it needs an answer and a task.
    """
    for field in ("prompt", "answer", "task") if answered else ("prompt",):
        if not getattr(line, field).strip():
            return f"{field} is empty or missing; expected text"
    if line.metric not in METRICS:
        return f"metric {line.metric!r} is unknown{near_matches(line.metric, METRICS)}"
    return METRICS[line.metric].refuses(line) if line.answer else None


def read_suite(file: Path, *, bad: list[BadLine] | None = None, answered: bool = True) -> list[Line]:
    """Read all lines; see `numbered_lines`."""
    return [line for _, line in numbered_lines(file, bad=bad, answered=answered)]


def numbered_lines(file: Path, *, bad: list[BadLine] | None = None, answered: bool = True) -> list[tuple[int, Line]]:
    """Read all lines, with their numbers in the file, from 1.

    Args:
        file: JSON lines of at most 1 MiB each.
        bad: a list that receives invalid lines, which are then skipped; with None they are an error.
        answered: whether every line needs an answer and a task; without, a missing answer is "".

    Raises:
        InputError: unreadable, empty, without any valid line, or, if `bad` is None, an invalid line; its number is given.
    """
    lines, skipped = [], list[BadLine]()
    try:
        with file.open("rb") as stream:
            for number, text in enumerate(_raw_lines(stream), 1):
                found = _line_of(text, file.parent, answered=answered) if without_mark(text).strip() else None
                if isinstance(found, Line):
                    lines.append((number, found))
                elif found is not None and bad is None:
                    raise InputError(f"{file}, line {number}: {found}")
                elif found is not None:
                    skipped.append(BadLine(number, found))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error}); expected JSON lines") from error
    if bad is not None:
        bad.extend(skipped)
    if not lines and skipped:
        first = skipped[0]
        raise InputError(f"{file}: none of its {len(skipped)} lines is valid; line {first.number}: {first.reason}")
    if not lines:
        raise InputError(f"{file}: no lines; expected at least one question")
    return lines


def _raw_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield lines; of a line that is too long only the start, which is also too long."""
    while text := stream.readline(LONGEST_LINE_BYTES + 1):
        rest = text
        while not rest.endswith(b"\n") and (rest := stream.readline(LONGEST_LINE_BYTES)):
            pass
        yield text


def _line_of(text: bytes, directory: Path, *, answered: bool) -> Line | str:
    """Return the line, or the reason why it is invalid."""
    if len(text) > LONGEST_LINE_BYTES:
        return f"longer than {LONGEST_LINE_BYTES} bytes; expected one question per line"
    try:
        line = parse_json(text, Line)
    except ParseError as error:
        return str(error)
    answer = given_answer(line.answer)
    if not answered:
        line = msgspec.structs.replace(line, task=line.task or _UNNAMED_TASK)
    line = msgspec.structs.replace(line, answer=answer if answered else answer.strip())
    flaw = flaw_of(line, answered=answered)
    if flaw is None and line.image is not None:
        line = msgspec.structs.replace(line, image=name_on_disk(directory, line.image))
        return missing_image(directory, line.image or "") or line
    return flaw or line


def name_on_disk(directory: Path, name: str) -> str:
    """Return a file name in its Unicode form on disk (macOS decomposes é); unchanged if there is no such file."""
    path, parts = os.fspath(directory), list[str]()
    for part in name.split("/"):
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        parts.append(next((form for form in forms if os.path.lexists(os.path.join(path, form))), part))
        path = os.path.join(path, parts[-1])
    return "/".join(parts)


def missing_image(directory: Path, image: str) -> str | None:
    """Return why an image cannot be read, or None if it is a file."""
    path = os.path.join(directory, image)  # os.path accepts any name; pathlib raises for some
    if os.path.isfile(path):
        return None
    if os.path.exists(path):
        return f"image {image} is not a regular file"
    return f"image {image} does not exist; image paths are relative to {directory}"


def write_suite(file: Path, lines: Iterable[Line], *, force: bool = True) -> int:
    """Write lines and return how many. The file is replaced as a whole; its directory is created if necessary.

    Raises:
        InputError: no lines, or one that `read_suite` would refuse, apart from its image; and as `staging.staged_file`.
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


def spread(lines: list[Line], wanted: int) -> list[Line]:
    """Return `wanted` lines, balanced over tasks, and evenly spaced within each task.

    Lines come by image, and few lines should be about many images: every task begins at another place, and images that no line
    is about yet come first.
    """
    wanted, by_task = min(wanted, len(lines)), defaultdict[str, list[Line]](list)
    for line in lines:
        by_task[line.task].append(line)
    counts = dict.fromkeys(by_task, 0)
    for task in itertools.islice(itertools.cycle(by_task), wanted * len(by_task)):
        if sum(counts.values()) < wanted and counts[task] < len(by_task[task]):
            counts[task] += 1
    chosen = [task for task, count in counts.items() if count]
    found, images = list[Line](), set[str | None]()
    for start, task in enumerate(chosen):
        left = dict(enumerate(by_task[task]))
        for i in range(counts[task]):
            even = (i * len(chosen) + start) * len(by_task[task]) // (counts[task] * len(chosen))
            # The line at an even distance, or the nearest to it that is about an image which no line is about yet.
            nearest = min(left, key=lambda at: (left[at].image in images, abs(at - even), at))
            images.add(left[nearest].image)
            found.append(left.pop(nearest))
    return found
