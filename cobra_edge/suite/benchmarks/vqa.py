"""VQAv2: open questions about COCO, ten annotators each. Source: Goyal et al., CVPR 2017; visualqa.org."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from ...errors import InputError
from ..line import Line
from .json_files import Text, read_json
from .prompts import short_answer
from .reader import Reader, Sources, most_common, require_unique


class _Question(msgspec.Struct, frozen=True):
    question_id: int
    image_id: Annotated[int, msgspec.Meta(ge=0, lt=10**12)]
    question: Text


class _Questions(msgspec.Struct, frozen=True):
    data_subtype: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]+$")]
    questions: tuple[_Question, ...]


class _Answer(msgspec.Struct, frozen=True):
    answer: str


class _Annotation(msgspec.Struct, frozen=True):
    question_id: int
    image_id: int
    answer_type: Literal["yes/no", "number", "other"]
    answers: tuple[_Answer, ...]


class _Annotations(msgspec.Struct, frozen=True):
    annotations: tuple[_Annotation, ...]


def _lines(sources: Sources) -> Iterator[Line]:
    assert sources.annotations is not None
    questions, answered = read_json(sources.questions, _Questions), read_json(sources.annotations, _Annotations).annotations
    require_unique(sources.questions, "question_id", (q.question_id for q in questions.questions))
    require_unique(sources.annotations, "question_id", (a.question_id for a in answered))
    of_question = {a.question_id: a for a in answered}
    for q in questions.questions:
        found = of_question.get(q.question_id)
        if found is None:
            raise InputError(f"{sources.annotations}: no annotation for question {q.question_id} of {sources.questions}")
        if found.image_id != q.image_id:
            raise InputError(
                f"{sources.annotations}: the annotation of question {q.question_id} is for image {found.image_id}, the "
                f"question for {q.image_id}; take both files of one split"
            )
        answers = tuple(a.answer for a in found.answers)
        yield Line(
            short_answer(q.question),
            most_common(sources.annotations, q.question_id, answers),
            f"vqa-v2-{found.answer_type.replace('/', '-')}",
            f"COCO_{questions.data_subtype}_{q.image_id:012d}.jpg",
            answers,
            "vqa",
            str(q.question_id),
        )


VQA = Reader(
    "vqa-v2",
    "v2_OpenEnded_mscoco_val2014_questions.json, annotations v2_mscoco_val2014_annotations.json",
    "COCO val2014",
    _lines,
    needs_annotations=True,
)
