"""GQA: composed questions about scenes. Source: Hudson and Manning, CVPR 2019; cs.stanford.edu/people/dorarad/gqa."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ..line import Line
from .json_files import ImageName, Text, read_json_by_key
from .prompts import short_answer
from .reader import Reader, Sources


class _Types(msgspec.Struct, frozen=True):
    structural: str


class _Question(msgspec.Struct, frozen=True, rename="camel"):
    question: Text
    answer: Text
    image_id: ImageName
    types: _Types
    is_balanced: bool


def _lines(sources: Sources) -> Iterator[Line]:
    for number, q in read_json_by_key(sources.questions, _Question):
        if q.is_balanced:  # accuracy is taken over these only
            task = "gqa-open" if q.types.structural == "query" else "gqa-binary"
            yield Line(short_answer(q.question), q.answer, task, f"{q.image_id}.jpg", metric="gqa", id=number)


GQA = Reader("gqa", "testdev_balanced_questions.json", "the set's own, images.zip", _lines)
