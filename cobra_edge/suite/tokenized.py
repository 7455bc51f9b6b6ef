"""A suite's lines as a model reads them: tokens of question and answer, and which image they are about."""

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
class TokenizedLine:
    """One line.

    Attributes:
        number: in the suite, from 1.
        line: question, answer, task and metric.
        prompt: tokens of the question in the model's template.
        answer: tokens of the answer, its end token last.
        image: index of its image, or None.
    """

    number: int
    line: Line
    prompt: tuple[int, ...]
    answer: list[int]
    image: int | None

    @property
    def tokens(self) -> list[int]:
        """Question and answer."""
        return [*self.prompt, *self.answer]


@dataclass(frozen=True, eq=False)
class TokenizedSuite:
    """What is asked.

    Attributes:
        name: of the file it came from.
        lines: in order.
        images: name of each image, by `TokenizedLine.image`.
        load: gives an image by its index, as a path or the bytes of a file.
        skipped: numbers of lines that were left out, and why.
    """

    name: str
    lines: Sequence[TokenizedLine]
    images: Sequence[str]
    load: Callable[[int], Path | bytes]
    skipped: dict[int, str]

    def sha256(self) -> str:
        """Return a hash over questions, answers and images."""
        digest = hashlib.sha256()
        for asked in self.lines:
            digest.update(msgspec.json.encode(asked.line))
        for index in range(len(self.images)):
            digest.update(image_sha256(self.load(index)).encode())
        return digest.hexdigest()

    def part(self, wanted: int) -> TokenizedSuite:
        """Return a suite of at most so many of the lines, spread evenly over tasks."""
        by_line = {id(asked.line): asked for asked in self.lines}
        chosen = {id(line) for line in spread([asked.line for asked in self.lines], wanted)}
        return replace(self, lines=[asked for key, asked in by_line.items() if key in chosen])

    def key(self, asked: TokenizedLine) -> tuple[str | None, str, str]:
        """Return what makes a line the same as another suite's: its image's content, question and answer."""
        image = None if asked.image is None else image_sha256(self.load(asked.image))
        return image, asked.line.prompt, asked.line.answer


def image_sha256(image: Path | bytes) -> str:
    """Return the hash of an image's file."""
    return hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()


def tokenized_suite(
    name: str,
    lines: Sequence[tuple[int, Line]],
    load: Callable[[str], Path | bytes],
    codec: TextCodec,
    template: PromptTemplate,
    *,
    sees: bool,
    skipped: dict[int, str],
) -> TokenizedSuite:
    """Return numbered lines as a model reads them; one without vision sees no images.

    Args:
        name: of the suite.
        lines: with their numbers.
        load: gives an image by its name.
        codec, template: the model's.
        sees: whether it has eyes.
        skipped: lines that were left out.

    Raises:
        InputError: a line that gives no tokens, or has no answer; its number is named.
    """
    asked, index = list[TokenizedLine](), dict[str, int]()
    for number, line in lines:
        try:
            prompt = codec.encode(template.first_turn(line.prompt))
        except InputError as error:
            raise InputError(f"{name}, line {number}: {error}") from error
        if not codec.encode(line.answer):
            raise InputError(f"{name}, line {number}: the answer {line.answer[:60]!r} has no token; expected what to say")
        image = index.setdefault(line.image, len(index)) if sees and line.image is not None else None
        asked.append(TokenizedLine(number, line, tuple(prompt), codec.answer(line.answer), image))
    names = list(index)
    return TokenizedSuite(name, asked, names, lambda image: load(names[image]), skipped)


def reply_limit(asked: TokenizedLine) -> int:
    """Return how many tokens a free answer to a line may have: the given one's and some more, the same for every build."""
    return len(asked.answer) + _FREE_TOKENS
