"""Exact match of reply and answer."""

from __future__ import annotations

import string

from ..line import Line
from .metric import Metric

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _exact(reply: str, line: Line) -> float:
    return float(reply.strip() in (line.answer.strip(), *(answer.strip() for answer in line.answers)))


def _gqa(reply: str, line: Line) -> float:
    """Normalise only the reply: an answer with a hyphen or a capital letter never matches, as in the original."""
    return float(reply.translate(_NO_PUNCTUATION).lower().strip() == line.answer)


EXACT = Metric("exact", _exact, None, "the reply, stripped of white space, equals an accepted answer")
GQA = Metric(
    "gqa",
    _gqa,
    None,
    "GQA's eval.py (Hudson and Manning, 2019): equality; of the reply ASCII punctuation is removed and it is put in lower "
    "case first, as github.com/TRI-ML/vlm-evaluation does, by which Cobra's figures were taken",
)
