"""Visual Spatial Reasoning: true or false? Source: Liu et al., TACL 2023; cambridgeltl/vsr_zeroshot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from ..line import Line
from .json_files import ImageName, Text, read_json_lines
from .prompts import true_or_false
from .reader import Reader, Sources


class _Statement(msgspec.Struct, frozen=True):
    image: ImageName
    caption: Text
    label: Literal[0, 1]


def _lines(sources: Sources) -> Iterator[Line]:
    for number, s in read_json_lines(sources.questions, _Statement):
        answer = "True" if s.label else "False"
        yield Line(true_or_false(s.caption), answer, "vsr", s.image, metric="vsr", id=str(number))  # the set has no ids


VSR = Reader("vsr", "test.jsonl of the zero-shot split", "the set's own, vsr_images.zip", _lines)
