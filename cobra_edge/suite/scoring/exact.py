"""Replies that must be the answer itself."""

from __future__ import annotations

import string

from ..line import Line
from .metric import Metric

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _exact(reply: str, line: Line) -> float:
    return float(reply.strip() in (line.answer.strip(), *(answer.strip() for answer in line.answers)))


def _gqa(reply: str, line: Line) -> float:
    """Only the reply is normalised: an answer of the file that has a hyphen or a capital is never given, there as here."""
    return float(reply.translate(_NO_PUNCTUATION).lower().strip() == line.answer)


EXACT = Metric("exact", _exact, None, "the reply without white space around it is an accepted answer, letter by letter")
GQA = Metric(
    "gqa",
    _gqa,
    None,
    "GQA's eval.py (Hudson and Manning, 2019): equality; of the reply ASCII punctuation is removed and it is put in lower "
    "case first, as github.com/TRI-ML/vlm-evaluation does, by which Cobra's figures were taken",
)
