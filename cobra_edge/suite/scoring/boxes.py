"""Bounding boxes."""

from __future__ import annotations

import re

from ..line import Line
from .metric import Metric, accepted

Box = tuple[float, float, float, float]

_NUMBER = r"\s*((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_ENOUGH = 0.5


def box_of(text: str) -> Box | None:
    """Return the first [x1, y1, x2, y2] in a text, as fractions of the image's width and height.

    None if there is none, it lies outside of the image (0 to 1) or it has no area.
    """
    found = _BOX.search(text)
    if found is None:
        return None
    left, top, right, bottom = (float(number) for number in found.groups())
    return (left, top, right, bottom) if left < right <= 1 and top < bottom <= 1 else None


def intersection_over_union(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0.0) * max(height, 0.0)
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (sum(areas) - shared)


def _box_iou(reply: str, line: Line) -> float:
    found, true = box_of(reply), box_of(accepted(line)[0])
    return float(found is not None and true is not None and intersection_over_union(found, true) >= _ENOUGH)


def _needs_box(line: Line) -> str | None:
    true = accepted(line)[0]
    if box_of(true) is not None:
        return None
    return f"answer {true!r}; metric box-iou takes [x1, y1, x2, y2] in shares of the image, from its upper left corner"


BOX_IOU = Metric(
    "box-iou",
    _box_iou,
    None,
    "right where the intersection is half of the union or more (Kazemzadeh et al., EMNLP 2014; Yu et al., ECCV 2016), boxes as "
    "github.com/TRI-ML/vlm-evaluation reads them",
    _needs_box,
)
