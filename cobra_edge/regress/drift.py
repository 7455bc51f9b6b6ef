"""Drift of a bundle on its own golden lines, as an export writes it into the manifest, and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..bundle.manifest import Drift
from ..inference.session import Session
from .aggregate import IMAGES_NEEDED, Aggregate, kind_of
from .budget import Limits
from .expected import expected_gate
from .gates import absolute_gate, gate_limits
from .golden import read_golden
from .line_metrics import measure_line
from .predictions import predictions
from .recorded import recorded_by_line
from .report import Figure, TooFew, Verdict


def measure_drift(session: Session, on_line: Callable[[], None] = lambda: None) -> Drift:
    """Run the golden lines through an opened bundle, and compare with the float model's predictions.

    Args:
        session: the opened bundle.
        on_line: called after each line, for progress.

    Raises:
        BundleError: golden lines that do not fit the model. DriftError: logits or states that are not finite.
        InputError: golden lines about one image.
    """
    golden, aggregate = read_golden(session.bundle), Aggregate()
    read = predictions(session, golden.suite)
    for tokenized, reference, prediction in zip(golden.suite.lines, golden.predictions, read, strict=True):
        aggregate.add(tokenized, measure_line(tokenized, reference, prediction, session.codec.decode))
        on_line()
    figures = aggregate.figures()
    return Drift(
        runtime=session.decoder.name,
        vision_runtime=None if session.vision is None else session.vision.name,
        lines=aggregate.total("lines"),
        positions=aggregate.total("tokens"),
        measures={name: figure.value for name, figure in figures.items() if figure.value is not None},
        activations=session.decoder.activations,
        by_line=recorded_by_line(aggregate),
        images=aggregate.images,
        intervals={
            name: (figure.low, figure.high)
            for name, figure in figures.items()
            if figure.low is not None and figure.high is not None
        },
        too_few={name: figure.too_few.images for name, figure in figures.items() if figure.too_few is not None},
    )


def figures_of(drift: Drift) -> dict[str, Figure]:
    """Return the measures of a drift with their intervals, or that there are too few images; without, of an earlier version."""

    def figure(name: str, value: float) -> Figure:
        if name in drift.too_few:
            return Figure(value, too_few=TooFew(drift.too_few[name], IMAGES_NEEDED[kind_of(name)]))
        return Figure(value, *drift.intervals.get(name, (None, None)))

    return {name: figure(name, value) for name, value in drift.measures.items()}


def judged_drift(drift: Drift, limits: Limits, noise_floor: Mapping[str, Mapping[str, float]]) -> tuple[Verdict, ...]:
    """Return the verdicts that `regress` returns on the golden lines of a bundle with the runtime of its export.

    The gate *recorded* compares this drift with itself, and is left out.

    Args:
        drift: as measured at the export.
        limits: of the drift budget.
        noise_floor: of the manifest.
    """
    figures = figures_of(drift)
    kld = drift.measures.get("kld_mean")
    return (
        *absolute_gate(figures, limits, noise_floor, {}).verdicts,
        *expected_gate(drift, kld, drift.images, noise_floor, gate_limits().expected).verdicts,
    )
