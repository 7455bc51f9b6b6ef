"""Calibration data that a user gives: a folder of images, or JSON lines with or without answers."""

from __future__ import annotations

from pathlib import Path

from ..terminal.output import tell
from .folder import read_folder
from .line_set import LineSet
from .reader import BadLine, read_suite


def read_calibration(source: Path, *, skip_bad: bool = False) -> LineSet:
    """Read calibration lines; an answer that is missing is "".

    Args:
        source: a folder of images, or a file of JSON lines.
        skip_bad: leave out what cannot be read, with one line that counts it.

    Raises:
        InputError: as `read_folder` or `read_suite`.
    """
    if source.is_dir():
        return read_folder(source, skip_bad=skip_bad)
    bad = list[BadLine]()
    lines = read_suite(source, bad=bad if skip_bad else None, answered=False)
    if bad:
        tell(f"{source}: {len(bad)} lines are invalid and left out, the first is line {bad[0].number}: {bad[0].reason}")
    return LineSet(source.name, lines, source.parent)
