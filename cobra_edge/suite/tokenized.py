"""A suite's lines as a model reads them: tokens of question and answer, and which picture they are about."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..errors import InputError
from ..inputs.text import PromptTemplate, TextCodec
from .line import Line
from .reader import spread

_FREE_TOKENS = 32  # that an answer of the model's own may have beyond the given one


@dataclass(frozen=True, eq=False)
class AskedLine:
    """One line.

    Attributes:
        number: in the suite, from 1.
        line: question, answer, task and metric.
        prompt: tokens of the question in the model's template.
        answer: tokens of the answer, its end token last.
        picture: index of its picture, or None.
    """

    number: int
    line: Line
    prompt: tuple[int, ...]
    answer: list[int]
    picture: int | None

    @property
    def tokens(self) -> list[int]:
        """Question and answer."""
        return [*self.prompt, *self.answer]


@dataclass(frozen=True, eq=False)
class AskedSuite:
    """What is asked.

    Attributes:
        name: of the file it came from.
        lines: in order.
        pictures: name of each picture, by `AskedLine.picture`.
        load: gives a picture by its index, as a path or the bytes of a file.
        skipped: numbers of lines that were left out, and why.
    """

    name: str
    lines: Sequence[AskedLine]
    pictures: Sequence[str]
    load: Callable[[int], Path | bytes]
    skipped: dict[int, str]

    def sha256(self) -> str:
        """Return a hash over questions, answers and pictures."""
        digest = hashlib.sha256()
        for asked in self.lines:
            digest.update(msgspec.json.encode(asked.line))
        for index in range(len(self.pictures)):
            digest.update(picture_sha256(self.load(index)).encode())
        return digest.hexdigest()

    def part(self, wanted: int) -> AskedSuite:
        """Return a suite of at most so many of the lines, spread evenly over tasks."""
        by_line = {id(asked.line): asked for asked in self.lines}
        chosen = {id(line) for line in spread([asked.line for asked in self.lines], wanted)}
        return replace(self, lines=[asked for key, asked in by_line.items() if key in chosen])

    def key(self, asked: AskedLine) -> tuple[str | None, str, str]:
        """Return what makes a line the same as another suite's: its picture's content, question and answer."""
        picture = None if asked.picture is None else picture_sha256(self.load(asked.picture))
        return picture, asked.line.prompt, asked.line.answer


def picture_sha256(picture: Path | bytes) -> str:
    """Return the hash of a picture's file."""
    return hashlib.sha256(picture if isinstance(picture, bytes) else picture.read_bytes()).hexdigest()


def asked_suite(
    name: str,
    lines: Sequence[tuple[int, Line]],
    load: Callable[[str], Path | bytes],
    codec: TextCodec,
    template: PromptTemplate,
    *,
    sees: bool,
    skipped: dict[int, str],
) -> AskedSuite:
    """Return numbered lines as a model reads them; one without vision sees no pictures.

    Args:
        name: of the suite.
        lines: with their numbers.
        load: gives a picture by its name.
        codec, template: the model's.
        sees: whether it has eyes.
        skipped: lines that were left out.

    Raises:
        InputError: a line that gives no tokens, or has no answer; its number is named.
    """
    asked, index = list[AskedLine](), dict[str, int]()
    for number, line in lines:
        try:
            prompt = codec.encode(template.first_turn(line.prompt))
        except InputError as error:
            raise InputError(f"{name}, line {number}: {error}") from error
        if not codec.encode(line.answer):
            raise InputError(f"{name}, line {number}: the answer {line.answer[:60]!r} has no token; expected what to say")
        picture = index.setdefault(line.image, len(index)) if sees and line.image is not None else None
        asked.append(AskedLine(number, line, tuple(prompt), codec.answer(line.answer), picture))
    names = list(index)
    return AskedSuite(name, asked, names, lambda picture: load(names[picture]), skipped)


def reply_limit(asked: AskedLine) -> int:
    """Return how many tokens a free answer to a line may have: the given one's and some more, the same for every build."""
    return len(asked.answer) + _FREE_TOKENS
