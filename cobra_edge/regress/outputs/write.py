"""Write the files of a report into a directory: all of them or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from ...errors import InputError
from ...files.staging import scratch_directory
from ..report import Report
from .badge import report_badge
from .html import report_html, require_html
from .junit import report_junit
from .libraries import require
from .markdown import report_markdown

FILES = ("report.json", "report.md", "junit.xml", "badge.svg", "report.html")


def check_directory(directory: Path, files: Collection[str] = FILES) -> None:
    """Check, before anything is measured, that `write_outputs` can write; creates the directory.

    Raises:
        InputError: the directory cannot be created or written, or contains a directory with the name of a file.
        MachineError: a library that one of the files needs is not installed.
    """
    if "junit.xml" in files:
        require("junit.xml", "junitparser")
    if "report.html" in files:
        require_html()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error}); give a writable directory") from error
    for name in files:
        if (directory / name).is_dir():
            raise InputError(f"{directory / name}: is a directory, expected a file; move it or give another directory")


def write_outputs(
    directory: Path,
    report: Report,
    images: Mapping[str, bytes],
    previous: Report | None = None,
    files: Collection[str] = FILES,
) -> None:
    """Write the files; they are renamed into place when all of them are complete. Other files are left alone.

    Args:
        directory: created if missing.
        report: to write.
        images: contents of image files, by the names in `report.worst`; a missing one is reported in the page.
        previous: to compare with.
        files: which of FILES.

    Raises:
        InputError: as `check_directory`; the report has a number that is not finite or an unknown measure.
        MachineError: a library is not installed.
    """
    check_directory(directory, files)
    contents = {name: _content(name, report, images, previous) for name in FILES if name in files}
    with scratch_directory(directory / "report") as stage:
        for name, content in contents.items():
            (stage / name).write_bytes(content)
        for name in contents:
            os.replace(stage / name, directory / name)


def _content(name: str, report: Report, images: Mapping[str, bytes], previous: Report | None) -> bytes:
    if name == "report.json":
        return report_json(report)
    if name == "report.md":
        return report_markdown(report, previous).encode()
    if name == "junit.xml":
        return report_junit(report)
    if name == "badge.svg":
        return report_badge(report).encode()
    return report_html(report, images, previous).encode()


def report_json(report: Report) -> bytes:
    """Return the report as JSON that `read_report` reads: indented, fields in the schema's order, names in dicts sorted.

    Raises:
        InputError: a number is not finite, which JSON cannot represent.
    """
    plain = msgspec.to_builtins(report, str_keys=True, order="deterministic")
    content = msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n"
    try:
        msgspec.json.decode(content, type=Report)
    except msgspec.ValidationError as error:
        raise InputError(
            f"the report cannot be written as JSON: {error}; expected finite figures, others belong in not_taken"
        ) from error
    return content
