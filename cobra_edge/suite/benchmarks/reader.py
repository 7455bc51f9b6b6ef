"""Readers of published benchmarks: from files to lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ..line import Line


@dataclass(frozen=True)
class Sources:
    """Files of a benchmark; None for files that are not given."""

    questions: Path
    annotations: Path | None = None
    ocr: Path | None = None


@dataclass(frozen=True)
class Reader:
    """One benchmark's format.

    Attributes:
        name: on the command line.
        files: names of the published files, for messages.
        images: name of the image set, for messages.
        needs_annotations: whether answers are in a separate file.
        takes_ocr: whether OCR words can be added to prompts.
    """

    name: str
    files: str
    images: str
    _lines: Callable[[Sources], Iterator[Line]]
    needs_annotations: bool = False
    takes_ocr: bool = False

    def read(self, sources: Sources) -> Iterator[Line]:
        """Yield each question; `image` is a file's name in the directory of images.

        Raises:
            InputError: a file is missing or unexpected, or a file or record is invalid; the message names both.
        """
        if self.needs_annotations and sources.annotations is None:
            raise InputError(f"{self.name} has its answers in a separate file; give --annotations ({self.files})")
        if not self.needs_annotations and sources.annotations is not None:
            raise InputError(f"{self.name} has its answers in the same file as the questions; omit --annotations")
        if not self.takes_ocr and sources.ocr is not None:
            raise InputError(f"{self.name} has no OCR words in its prompts; omit --ocr")
        yield from self._lines(sources)


def require_unique(file: Path, what: str, ids: Iterable[int | str]) -> None:
    """Raise InputError if an id is repeated."""
    seen = set[int | str]()
    for number in ids:
        if number in seen:
            raise InputError(f"{file}: {what} {number} is repeated; expected unique ones")
        seen.add(number)


def most_common(file: Path, record: int | str, answers: Iterable[str]) -> str:
    """Return the most frequent answer, the first of several. Raises InputError if there is none."""
    given = Counter(answer.strip() for answer in answers if answer.strip())
    if not given:
        raise InputError(f"{file}: record {record} has no answers; expected at least one that is not empty")
    return given.most_common(1)[0][0]
