"""One line of a data set: a prompt with its answer, and how replies are scored."""

from __future__ import annotations

import msgspec


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One prompt with its answer.

    Attributes:
        prompt: the question, without the template of a model.
        answer: used for teacher forcing, normalised by `given_answer`; empty only in calibration data, for the model's own.
        task: kind of the question; results are grouped by it.
        image: path relative to the suite's directory; None for a text-only question.
        answers: every accepted answer as annotators gave them, duplicates kept; empty if `answer` is the only one.
        metric: how a reply is scored, a name in `scoring.METRICS`.
        id: of the question in its original data set.
    """

    prompt: str
    answer: str = ""
    task: str = ""
    image: str | None = None
    answers: tuple[str, ...] = ()
    metric: str = "exact"
    id: str | None = None
