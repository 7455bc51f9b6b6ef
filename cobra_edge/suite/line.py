"""One line of a data set: a question with its answer, and how replies to it are scored."""

from __future__ import annotations

import msgspec


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One question with its answer.

    Attributes:
        prompt: the question.
        answer: what the model is teacher-forced on, as `given_answer` normalises it.
        task: the kind of question, by which results are grouped.
        image: relative to the suite's directory, None for a question about text.
        answers: every accepted answer as annotators gave them, duplicates kept; empty where `answer` is the only one.
        metric: how a reply is scored, a name in scoring's table.
        id: the question's name in the set that it comes from.
    """

    prompt: str
    answer: str
    task: str
    image: str | None = None
    answers: tuple[str, ...] = ()
    metric: str = "exact"
    id: str | None = None
