"""RefCOCO, RefCOCO+ and RefCOCOg: locate the described region. COCO annotations with one expression per image entry.

Source: Kazemzadeh et al., EMNLP 2014; Yu et al., ECCV 2016; the format is that of MDETR (Kamath et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from ...errors import InputError
from ..line import Line
from .json_files import ImageName, Text, read_json
from .prompts import box_of_expression
from .reader import Reader, Sources, require_unique

_PICKLES = {".p", ".pkl", ".pickle"}
_SLACK_PIXELS = 0.02  # corner and size are each rounded to hundredths

_Pixels = Annotated[int, msgspec.Meta(gt=0)]


class _Expression(msgspec.Struct, frozen=True):
    id: int
    file_name: ImageName
    width: _Pixels
    height: _Pixels
    caption: Text
    dataset_name: Text


class _Target(msgspec.Struct, frozen=True):
    image_id: int
    bbox: tuple[float, float, float, float]


class _Expressions(msgspec.Struct, frozen=True):
    images: tuple[_Expression, ...]
    annotations: tuple[_Target, ...]


def _lines(sources: Sources) -> Iterator[Line]:
    file = sources.questions
    if file.suffix.lower() in _PICKLES:
        raise InputError(
            f"{file} is a pickle, which could run any program as it is read, so it is not; take the same expressions as JSON: "
            "finetune_refcoco_val.json of mdetr_annotations.tar.gz (zenodo.org/record/4729015)"
        )
    content = read_json(file, _Expressions)
    require_unique(file, "images id", (expression.id for expression in content.images))
    require_unique(file, "annotation of image_id", (target.image_id for target in content.annotations))
    targets = {target.image_id: target for target in content.annotations}
    for expression in content.images:
        if expression.id not in targets:
            raise InputError(f"{file}: no annotation for image {expression.id}")
        true = _shares(file, expression, targets[expression.id].bbox)
        yield Line(
            box_of_expression(expression.caption),
            str([round(share, 2) for share in true]),
            expression.dataset_name,
            expression.file_name,
            (str(true),),
            "box-iou",
            str(expression.id),
        )


def _shares(file: Path, expression: _Expression, box: tuple[float, float, float, float]) -> list[float]:
    """Return [left, top, right, bottom] as fractions of the image, from (left, top, width, height) in pixels."""
    left, top, width, height = box
    right, bottom, slack = left + width, top + height, _SLACK_PIXELS
    inside = left >= -slack and top >= -slack and right <= expression.width + slack and bottom <= expression.height + slack
    if width <= 0 or height <= 0 or not inside:
        raise InputError(
            f"{file}: the box {list(box)} of image {expression.id} has no area in its image of {expression.width} x "
            f"{expression.height} pixels; expected [left, top, width, height]"
        )
    corners = (left / expression.width, top / expression.height, right / expression.width, bottom / expression.height)
    return [min(max(corner, 0.0), 1.0) for corner in corners]


REFCOCO = Reader(
    "refcoco", "finetune_{refcoco,refcoco+,refcocog}_val.json of mdetr_annotations.tar.gz", "COCO train2014", _lines
)
