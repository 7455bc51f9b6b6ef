"""Run a suite through a session: is each answer right, how likely was it, and what did the model think at each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..decode.decoder import DecoderState
from ..inference.session import Session
from ..suite.line import Line
from .metrics import negative_log_likelihood


@dataclass(frozen=True, eq=False)
class LineResult:
    """One line, teacher-forced on its answer and end token.

    Attributes:
        line: the question.
        logits: (n_answer, vocab) float32, before each token of the answer.
        right: every token of the answer is the likeliest one, which is when greedy decoding gives exactly this answer.
        nll: (n_answer,) float64, -log p of each token of the answer.
    """

    line: Line
    logits: np.ndarray
    right: bool
    nll: np.ndarray


def run_suite(
    session: Session, lines: list[Line], directory: Path, on_line: Callable[[], None] = lambda: None
) -> Iterator[LineResult]:
    """Yield the result of each line; an image that follows itself is looked at once.

    Args:
        session: an opened bundle.
        lines: a suite's.
        directory: where image paths start.
        on_line: called after each line, for progress.
    """
    looked: tuple[str | None, DecoderState] = (None, session.decoder.new_state())
    for line in lines:
        if line.image is not None and line.image != looked[0]:
            looked = (line.image, session.look(directory / line.image))
        state = looked[1].copy() if line.image is not None else session.decoder.new_state()
        prompt = session.codec.encode(session.template.first_turn(line.prompt))
        answer = session.codec.answer(line.answer)
        embeddings = session.decoder.embed([*prompt, *answer[:-1]])
        logits = session.decoder.forward(embeddings, state)[len(prompt) - 1 :]
        targets = np.array(answer)
        yield LineResult(line, logits, bool((logits.argmax(-1) == targets).all()), negative_log_likelihood(logits, targets))
        on_line()
