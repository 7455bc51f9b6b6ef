"""A suite as a model reads it: tokens of prompts and answers, and the index of the image of each line."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from ..errors import InputError
from ..inputs.text import PromptTemplate, TextCodec
from .line import Line
from .reader import spread

_FREE_TOKENS = 32  # by which a reply may be longer than the given answer
State = TypeVar("State")


@dataclass(frozen=True, eq=False)
class TokenizedLine:
    """One line.

    Attributes:
        number: in the suite, from 1.
        line: prompt, answer, task and metric.
        prompt: tokens of the prompt in the model's template.
        answer: tokens of the answer, the end token last.
        image: index of its image in the suite, or None.
        choices: tokens of each answer there is, the end token last: the reply is the most probable one. Empty: it is generated.
    """

    number: int
    line: Line
    prompt: tuple[int, ...]
    answer: list[int]
    image: int | None
    choices: tuple[tuple[int, ...], ...] = ()

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]

    @property
    def inputs(self) -> list[int]:
        """The tokens that a teacher-forced pass reads: all but the last."""
        return self.tokens[:-1]

    @property
    def answer_from(self) -> int:
        """Index in `inputs` of the position whose logits predict the first answer token."""
        return len(self.prompt) - 1


@dataclass(frozen=True, eq=False)
class TokenizedSuite:
    """Tokenized lines and their images.

    Attributes:
        name: file name of the suite.
        lines: in order.
        images: name of each image, by `TokenizedLine.image`.
        load: returns an image by its index, as a path or the bytes of a file.
        skipped: reasons of skipped lines, by line number.
        embeddings: (images, n_visual_tokens, d_model) float32, visual embeddings by image; None if not computed.
    """

    name: str
    lines: Sequence[TokenizedLine]
    images: Sequence[str]
    load: Callable[[int], Path | bytes]
    skipped: dict[int, str]
    embeddings: np.ndarray | None = None

    def sha256(self) -> str:
        """Return a hash over prompts, answers and images."""
        digest = hashlib.sha256()
        for line in self.lines:
            digest.update(msgspec.json.encode(line.line))
            if line.choices:
                digest.update(msgspec.json.encode(line.choices))
        for index in range(len(self.images)):
            digest.update(image_sha256(self.load(index)).encode())
        return digest.hexdigest()

    def part(self, wanted: int) -> TokenizedSuite:
        """Return a suite of at most `wanted` lines, spread evenly over tasks."""
        by_line = {id(line.line): line for line in self.lines}
        chosen = {id(line) for line in spread([line.line for line in self.lines], wanted)}
        return replace(self, lines=[line for key, line in by_line.items() if key in chosen])

    def key(self, line: TokenizedLine) -> tuple[str | None, str, str]:
        """Return what identifies a line across suites: hash of its image, prompt and answer."""
        image = None if line.image is None else image_sha256(self.load(line.image))
        return image, line.line.prompt, line.line.answer


def image_sha256(image: Path | bytes) -> str:
    """Return the hash of an image file."""
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
    answered: bool = True,
) -> TokenizedSuite:
    """Tokenize numbered lines; images are indexed in the order of their first use.

    Args:
        name: of the suite.
        lines: with their numbers.
        load: returns an image by its name.
        codec, template: of the model.
        sees: whether the model has a vision encoder; without one, images are ignored.
        skipped: reasons of skipped lines, by line number.
        answered: whether every line needs an answer; without, one that has none gets the end token alone.

    Raises:
        InputError: a prompt or an answer has no tokens; the message names the line number.
    """
    tokenized, index = list[TokenizedLine](), dict[str, int]()
    for number, line in lines:
        try:
            prompt = codec.encode(template.first_turn(line.prompt))
        except InputError as error:
            raise InputError(f"{name}, line {number}: {error}") from error
        if not codec.encode(line.answer) and (answered or line.answer):
            raise InputError(f"{name}, line {number}: the answer {line.answer[:60]!r} has no tokens; expected text to say")
        image = index.setdefault(line.image, len(index)) if sees and line.image is not None else None
        tokenized.append(TokenizedLine(number, line, tuple(prompt), codec.answer(line.answer), image))
    names = list(index)
    return TokenizedSuite(name, tokenized, names, lambda image: load(names[image]), skipped)


def with_image_state(
    lines: Iterable[TokenizedLine], look: Callable[[int | None], State]
) -> Iterator[tuple[TokenizedLine, State]]:
    """Yield each line with the state after its image; consecutive lines about one image share one call of `look`.

    Args:
        lines: those about one image should follow each other.
        look: returns the state after reading an image, by its index; the empty state for None. Users copy it.
    """
    for image, group in itertools.groupby(lines, key=lambda line: line.image):
        state = look(image)
        for line in group:
            yield line, state


def reply_limit(line: TokenizedLine) -> int:
    """Return the token limit of a free reply to a line: the given answer's length plus a margin, the same for every build."""
    return len(line.answer) + _FREE_TOKENS
