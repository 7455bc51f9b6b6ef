"""Binary questions: yes or no, true or false."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..line import Line
from .metric import Metric

_NEGATIONS = {"No", "no", "not"}
_TRUE_OR_FALSE = re.compile(r"\b(true|false)\b", re.IGNORECASE)


def _says_yes(reply: str) -> bool:
    """Parse a reply as POPE does: its first sentence, without commas, means yes unless it contains the word No, no or not.

    Words are separated by spaces only and compared case-sensitively: "NO", "No!" and "No" before a line break mean yes.
    """
    return _NEGATIONS.isdisjoint(reply.split(".")[0].replace(",", "").split(" "))


def _means_yes(line: Line) -> bool:
    return line.answer.strip().lower() != "no"


def _yes_no(reply: str, line: Line) -> float:
    return float(_says_yes(reply) == _means_yes(line))


def _yes_no_summary(pairs: Sequence[tuple[Line, str]]) -> dict[str, float]:
    """Return accuracy, precision, recall and F1 of yes, and the share of yes among replies."""
    outcomes = [(_says_yes(reply), _means_yes(line)) for line, reply in pairs]
    right_yes, right_no = outcomes.count((True, True)), outcomes.count((False, False))
    said, true = (sum(side) for side in zip(*outcomes, strict=True)) if outcomes else (0, 0)
    parts = {
        "accuracy": (right_yes + right_no, len(outcomes)),
        "precision": (right_yes, said),
        "recall": (right_yes, true),
        "f1": (2 * right_yes, said + true if right_yes else 0),
        "yes_share": (said, len(outcomes)),
    }
    return {name: share / whole for name, (share, whole) in parts.items() if whole}


def _vsr(reply: str, line: Line) -> float:
    """Score the first "true" or "false" in a reply; a reply without either is wrong."""
    found = _TRUE_OR_FALSE.search(reply)
    return float(found is not None and found[1].lower() == line.answer.strip().lower())


def _needs_yes_or_no(line: Line) -> str | None:
    return None if line.answer.strip().lower() in ("yes", "no") else f"answer {line.answer!r}; metric yes-no takes yes or no"


def _needs_true_or_false(line: Line) -> str | None:
    found = line.answer.strip().lower() in ("true", "false")
    return None if found else f"answer {line.answer!r}; metric vsr takes True or False"


YES_NO = Metric(
    "yes-no",
    _yes_no,
    _yes_no_summary,
    "evaluate.py of github.com/AoiDragon/POPE (Li et al., EMNLP 2023)",
    _needs_yes_or_no,
    ("Yes", "No"),
)
VSR = Metric(
    "vsr",
    _vsr,
    None,
    "our own rule for Visual Spatial Reasoning (Liu et al., TACL 2023): the first 'true' or 'false' of the reply; published "
    "figures compare the probabilities of the two words",
    _needs_true_or_false,
    ("True", "False"),
)
