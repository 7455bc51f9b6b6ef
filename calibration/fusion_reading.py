"""How variants of cobra-mini answer: through the bundle and the runtime that ship, by the measures of `regress`.

Where the image comes last the reading is ours: an export has no place for that order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cobra_edge.bench.spread import Spread, spread
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.decoder import DEFAULT_OPTIONS
from cobra_edge.decode.sampling import GREEDY
from cobra_edge.export.lines import tokenized_lines
from cobra_edge.inference.generate import generate
from cobra_edge.inference.session import Session
from cobra_edge.inputs.text import PromptTemplate
from cobra_edge.regress.aggregate import Aggregate
from cobra_edge.regress.line_metrics import measure_line
from cobra_edge.regress.metrics import log_softmax
from cobra_edge.regress.predictions import Prediction
from cobra_edge.regress.report import Figure, TaskFigures
from cobra_edge.regress.runner import Run, measure
from cobra_edge.regress.state_sketch import state_sketch
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.tokenized import TokenizedLine, TokenizedSuite, reply_limit

_TIMED = 9  # first answers


@dataclass(frozen=True)
class Reading:
    """Measures of a build against its float model, and those of each task."""

    measures: Mapping[str, Figure]
    tasks: Sequence[TaskFigures]


def golden_reading(bundle: Path) -> Reading:
    """Compare a bundle with the golden lines that it holds."""
    run = Run(bundle, "fp16", None, None, False, "cpu", "auto", "auto", DEFAULT_OPTIONS, 0, None)
    report = measure(run, None, None, None).report
    return Reading(report.measures, report.tasks)


def image_last_reading(bundle: Path, reference: Path, lines: LineSet) -> Reading:
    """Compare a bundle with a float16 one on lines, each read as question, image, mark of the answer, answer."""
    build, truth = (Session(Bundle.open(directory), device="cpu") for directory in (bundle, reference))
    suite, aggregate = tokenized_lines(lines, build.codec, build.config), Aggregate()
    pairs = zip(_predictions(truth, suite), _predictions(build, suite), strict=True)
    for line, (true, found) in zip(suite.lines, pairs, strict=True):
        aggregate.add(line, measure_line(line, true, found, build.codec.decode))
    return Reading(aggregate.figures(), aggregate.tasks())


def _predictions(session: Session, suite: TokenizedSuite) -> Iterator[Prediction]:
    seen = [session.visual_embeddings(suite.load(index)) for index in range(len(suite.images))]
    tail = answer_mark(session)
    for line in suite.lines:
        assert line.image is not None and line.prompt[-len(tail) :] == tail
        yield _read_image_last(session, line, seen[line.image], len(line.prompt) - len(tail))


def answer_mark(session: Session) -> tuple[int, ...]:
    """Return the tokens of a prompt after the question: its end, and the mark of the answer."""
    one, other = (
        session.codec.encode(PromptTemplate(session.config.prompt_style).first_turn(word)) for word in ("red", "blue")
    )
    same = next(i for i, (a, b) in enumerate(zip(reversed(one), reversed(other), strict=False)) if a != b)
    return tuple(one[len(one) - same :])


def _read_image_last(session: Session, line: TokenizedLine, embeddings: np.ndarray, at: int) -> Prediction:
    """Return the prediction of a line; `at` tokens of its prompt come before the image. See `regress.predictions.read_line`."""
    decoder, state = session.decoder, session.decoder.new_state()
    question = decoder.forward(decoder.embed(list(line.prompt[:at])), state)
    decoder.prefill(embeddings, state)
    mark = decoder.forward(decoder.embed(list(line.prompt[at:])), state)
    free = state.copy()
    answer = decoder.forward(decoder.embed(line.answer[:-1]), state)
    reply = tuple(generate(decoder, mark[-1], free, session.codec.end_id, reply_limit(line), GREEDY))
    logits = np.concatenate([question, mark, answer])
    return Prediction(log_softmax(logits), state_sketch(state.ssm), reply, embeddings)


def first_token_ms(bundle: Path, lines: LineSet) -> Spread:
    """Return how long the first token of an answer takes, from an image's file: vision, visual tokens, a question."""
    session, found = Session(Bundle.open(bundle), device="cpu"), list[float]()
    suite = tokenized_lines(lines, session.codec, session.config)
    for line in suite.lines[: _TIMED + 1]:  # the first warms up
        assert line.image is not None
        began, state = time.perf_counter(), session.decoder.new_state()
        session.decoder.prefill(session.visual_embeddings(suite.load(line.image)), state)
        session.decoder.prefill(session.decoder.embed(list(line.prompt)), state).argmax()
        found.append((time.perf_counter() - began) * 1e3)
    return spread(found[1:])
