"""POPE: is an object in the image? Source: Li et al., EMNLP 2023; github.com/AoiDragon/POPE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from ..line import Line
from .json_files import ImageName, Text, read_json_lines
from .prompts import short_answer
from .reader import Reader, Sources, require_unique

_SPLITS = ("adversarial", "popular", "random")


class _Question(msgspec.Struct, frozen=True):
    question_id: int | str
    image: ImageName
    text: Text
    label: Literal["yes", "no"]


def _lines(sources: Sources) -> Iterator[Line]:
    stem = sources.questions.stem
    task = next((f"pope-{split}" for split in _SPLITS if stem.endswith(split)), "pope")  # only the file's name tells
    questions = [question for _, question in read_json_lines(sources.questions, _Question)]
    require_unique(sources.questions, "question_id", (q.question_id for q in questions))
    for q in questions:
        yield Line(short_answer(q.text), q.label, task, q.image, metric="yes-no", id=str(q.question_id))


POPE = Reader("pope", "coco_pope_{adversarial,popular,random}.json", "COCO val2014", _lines)
