"""TextVQA: questions about text in images, with or without OCR words.

Source: Singh et al., CVPR 2019; textvqa.org.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from ...errors import InputError
from ..line import Line
from .json_files import ImageName, Text, read_json
from .prompts import short_answer, with_ocr
from .reader import Reader, Sources, most_common, require_unique


class _Question(msgspec.Struct, frozen=True):
    question_id: int
    image_id: ImageName
    question: Text
    answers: tuple[str, ...]


class _Questions(msgspec.Struct, frozen=True):
    data: tuple[_Question, ...]


class _Words(msgspec.Struct, frozen=True):
    image_id: str
    ocr_tokens: tuple[str, ...]


class _Ocr(msgspec.Struct, frozen=True):
    data: tuple[_Words, ...]


def _words_of_images(file: Path) -> dict[str, tuple[str, ...]]:
    found = read_json(file, _Ocr).data
    require_unique(file, "image_id", (words.image_id for words in found))
    return {words.image_id: words.ocr_tokens for words in found}


def _lines(sources: Sources) -> Iterator[Line]:
    questions = read_json(sources.questions, _Questions).data
    require_unique(sources.questions, "question_id", (q.question_id for q in questions))
    words = None if sources.ocr is None else _words_of_images(sources.ocr)
    for q in questions:
        prompt, task = q.question.capitalize(), "textvqa"  # the file has small letters, LLaVA's prompts a capital
        if words is not None:
            if q.image_id not in words:
                raise InputError(f"{sources.ocr}: no words of image {q.image_id}, which question {q.question_id} is about")
            prompt, task = with_ocr(prompt, words[q.image_id]), "textvqa-ocr"
        answer = most_common(sources.questions, q.question_id, q.answers)
        yield Line(short_answer(prompt), answer, task, f"{q.image_id}.jpg", q.answers, "textvqa", str(q.question_id))


TEXT_VQA = Reader(
    "textvqa",
    "TextVQA_0.5.1_val.json; OCR TextVQA_Rosetta_OCR_v0.2_val.json",
    "the set's own, train_val_images.zip",
    _lines,
    takes_ocr=True,
)
