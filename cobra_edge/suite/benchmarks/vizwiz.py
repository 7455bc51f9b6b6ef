"""VizWiz: questions of blind people about their own images. Source: Gurari et al., CVPR 2018; vizwiz.org."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from ..line import Line
from .json_files import ImageName, Text, read_json
from .prompts import short_answer_if_any
from .reader import Reader, Sources, most_common, require_unique


class _Answer(msgspec.Struct, frozen=True):
    answer: str


class _Question(msgspec.Struct, frozen=True):
    image: ImageName
    question: Text
    answers: tuple[_Answer, ...]
    answerable: Literal[0, 1]


def _lines(sources: Sources) -> Iterator[Line]:
    questions = read_json(sources.questions, tuple[_Question, ...])
    require_unique(sources.questions, "image", (q.image for q in questions))  # one question an image: its name is the id
    for q in questions:
        answers = tuple(a.answer for a in q.answers)
        answer = most_common(sources.questions, q.image, answers)
        task = "vizwiz-answerable" if q.answerable else "vizwiz-unanswerable"
        yield Line(short_answer_if_any(q.question), answer, task, q.image, answers, "vizwiz", q.image)


VIZWIZ = Reader("vizwiz", "val.json of Annotations.zip", "the set's own, val.zip", _lines)
