"""Drift of a bundle on its own golden lines, without intervals, as an export writes it into the manifest."""

from __future__ import annotations

from collections.abc import Callable

from ..bundle.manifest import Drift
from ..inference.session import Session
from .aggregate import Aggregate
from .golden import read_golden
from .line_metrics import measure_line
from .predictions import predictions
from .recorded import recorded_by_line


def measure_drift(session: Session, on_line: Callable[[], None] = lambda: None) -> Drift:
    """Run the golden lines through an opened bundle, and compare with the float model's predictions.

    Args:
        session: the opened bundle.
        on_line: called after each line, for progress.

    Raises:
        BundleError: golden lines that do not fit the model. DriftError: logits or states that are not finite.
    """
    golden, aggregate = read_golden(session.bundle), Aggregate()
    read = predictions(session, golden.suite)
    for tokenized, reference, prediction in zip(golden.suite.lines, golden.predictions, read, strict=True):
        aggregate.add(tokenized, measure_line(tokenized, reference, prediction, session.codec.decode))
        on_line()
    vision = None if session.vision is None else session.vision.name
    return Drift(
        session.decoder.name,
        vision,
        aggregate.total("lines"),
        aggregate.total("tokens"),
        aggregate.values(),
        session.decoder.activations,
        recorded_by_line(aggregate),
    )
