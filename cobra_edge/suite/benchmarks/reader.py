"""What a reader is: which files it takes, and that it yields lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ..line import Line


@dataclass(frozen=True)
class Sources:
    """The files of a benchmark on this machine; None for what its reader does not take."""

    questions: Path
    annotations: Path | None = None
    ocr: Path | None = None


@dataclass(frozen=True)
class Reader:
    """One benchmark's format.

    Attributes:
        name: on the command line.
        files: which published files it reads, for people.
        images: which images go with them, for people.
        needs_annotations: answers lie in a file of their own.
        takes_ocr: words found in the images may be given.
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
            InputError: a file that is needed and not given, or given and not read; a file or record that is not what it should
                be (both are named).
        """
        if self.needs_annotations and sources.annotations is None:
            raise InputError(f"{self.name} has its answers in a file of their own; give --annotations ({self.files})")
        if not self.needs_annotations and sources.annotations is not None:
            raise InputError(f"{self.name} has its answers beside the questions; leave --annotations out")
        if not self.takes_ocr and sources.ocr is not None:
            raise InputError(f"{self.name} has no words of an OCR in its questions; leave --ocr out")
        yield from self._lines(sources)


def require_unique(file: Path, what: str, ids: Iterable[int | str]) -> None:
    """Raise InputError where an id comes twice."""
    seen = set[int | str]()
    for number in ids:
        if number in seen:
            raise InputError(f"{file}: {what} {number} comes twice; expected each once")
        seen.add(number)


def most_common(file: Path, record: int | str, answers: Iterable[str]) -> str:
    """Return the answer that most annotators gave, of several the first. Raises InputError where none gave any."""
    given = Counter(answer.strip() for answer in answers if answer.strip())
    if not given:
        raise InputError(f"{file}: record {record} has no answer; expected at least one that is not empty")
    return given.most_common(1)[0][0]
