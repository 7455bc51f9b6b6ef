"""A metric: how replies are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..line import Line


def accepts_all(_line: Line) -> str | None:
    """Accept every line."""
    return None


@dataclass(frozen=True)
class Metric:
    """One way to score replies.

    Attributes:
        name: as in `Line.metric`.
        score: returns the score of a reply to a line, 0 to 1.
        summary: returns figures that are not means of scores, from lines with replies, without undefined ones; None if there
            are none.
        source: reference of the rule.
        refuses: returns why a line cannot be scored, or None.
        choices: all answers there are, for scoring by their probabilities; none if they are open.
    """

    name: str
    score: Callable[[str, Line], float]
    summary: Callable[[Sequence[tuple[Line, str]]], dict[str, float]] | None
    source: str
    refuses: Callable[[Line], str | None] = accepts_all
    choices: tuple[str, ...] = ()


def accepted(line: Line) -> tuple[str, ...]:
    """Return every accepted answer of a line: the annotators', or `answer`."""
    return line.answers or (line.answer,)
