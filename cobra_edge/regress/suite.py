"""Read a suite: JSON lines of {"image", "prompt", "answer", "task"}, image paths relative to the file."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import msgspec

from ..errors import InputError
from ..resources import MINI

HELDOUT, CALIBRATION = MINI / "heldout.jsonl", MINI / "calibration.jsonl"


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question with its answer. `image` is relative to the suite's directory, None for a question about text."""

    prompt: str
    answer: str
    task: str
    image: str | None = None


def read_suite(file: Path) -> list[Line]:
    """Read every line.

    Raises:
        InputError: unreadable, empty, a line that is not what it should be (its number is named), or a missing picture.
    """
    try:
        raw = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); expected JSON lines") from error
    lines = []
    for number, text in enumerate(raw, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InputError(f"{file}, line {number}: {error}") from error
        if line.image is not None and not (file.parent / line.image).is_file():
            raise InputError(f"{file}, line {number}: picture {line.image} is not there")
        lines.append(line)
    if not lines:
        raise InputError(f"{file}: no lines; expected at least one question")
    return lines


def pictures_of(suite: Path) -> list[Path]:
    """Return every picture of a suite once, in order. Raises InputError as `read_suite` does."""
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
