"""What a metric is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..line import Line


def accepts_all(_line: Line) -> str | None:
    """Refuse no line."""
    return None


@dataclass(frozen=True)
class Metric:
    """One way to score replies.

    Attributes:
        name: as lines name it.
        score: takes a reply and its line, gives 0 to 1.
        summary: takes lines with their replies, gives figures that are no mean of scores; None where the mean says it all.
            A figure that is not defined for these replies is left out.
        source: whose rule it is.
        refuses: says what a line lacks to be scored so, None where nothing.
    """

    name: str
    score: Callable[[str, Line], float]
    summary: Callable[[Sequence[tuple[Line, str]]], dict[str, float]] | None
    source: str
    refuses: Callable[[Line], str | None] = accepts_all


def accepted(line: Line) -> tuple[str, ...]:
    """Return every accepted answer of a line: the annotators', else the one it has."""
    return line.answers or (line.answer,)
