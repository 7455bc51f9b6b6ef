"""How often the harness's 95 % intervals contain the true value, by drawing suites from the held-out one.

The held-out suite is the population: its own figures are the true values. Suites are drawn from its images with replacement,
and the harness evaluates each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec.structs import replace

from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import Bundle
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.targets import target_named
from cobra_edge.inference.session import Session, load
from cobra_edge.regress.aggregate import IMAGES_NEEDED, Aggregate, kind_of
from cobra_edge.regress.line_metrics import measure_line
from cobra_edge.regress.predictions import predictions
from cobra_edge.regress.report import Figure
from cobra_edge.suite.reader import HELDOUT, read_suite
from cobra_edge.suite.tokenized import TokenizedSuite, tokenized_suite

from .interval_coverage_result import CoverageRow

BUILDS: dict[str, dict[str, Any]] = {
    "w4a16-g128": {"scheme": "w4a16-g128", "vision_precision": "fp32"},
    "w8a16-g128": {"scheme": "w8a16-g128", "vision_precision": "fp32"},
    "w4a16-g128, int8 vision": {"scheme": "w4a16-g128", "vision_precision": "int8"},
}
METHODS = {"share": "Wilson", "share change": "Tango", "quantile": "test inversion"}
_TRANSFORMED_T = "Hall"  # of the other kinds
SIZES = (8, 16, 32, 64)  # images of small suites; the largest is the whole one's
REPLICATES = 2000
_SEED = 1
_NOT_JUDGED = "kld_max"  # the maximum over lines has no interval
_ROUNDING = 1e-9  # relative tolerance of an end that equals the value

OnStep = Callable[[str, int, int], None]


def measure(folder: Path, replicates: int = REPLICATES, on_step: OnStep = lambda what, done, total: None) -> list[CoverageRow]:
    """Measure the coverage of every interval, on builds of cobra-mini compared with its fp16 build.

    Args:
        folder: for bundles.
        replicates: drawn suites of each size.
        on_step: called with the step, how much of it is done, and the total.

    Returns:
        Rows of `coverage`, with the label of their build.
    """
    reference = _session(folder, "fp16", {"scheme": "fp16", "vision_precision": "fp32"})
    lines = list(enumerate(read_suite(HELDOUT), 1))
    codec, template = reference.codec, reference.template
    suite = tokenized_suite("heldout", lines, lambda name: HELDOUT.parent / name, codec, template, sees=True, skipped={})
    rows = []
    for label, export in BUILDS.items():
        aggregate = _aggregate(suite, reference, _session(folder, label, export), _counter(on_step, label, len(lines)))
        for images in (*SIZES, aggregate.images):
            what = f"{label}, suites of {images}"
            found = coverage(aggregate, images, replicates, _counter(on_step, what, replicates))
            rows += [replace(row, build=label) for row in found]
    return rows


class Population(Protocol):
    """Images with known figures, as `Aggregate`."""

    @property
    def images(self) -> int:
        """Number of images."""
        ...

    def resampled(self, images: Sequence[int]) -> Population:
        """Return the population of these images, given by index; an image may come several times."""
        ...

    def figures(self) -> dict[str, Figure]:
        """Return figures with their intervals, by measure."""
        ...


def coverage(
    population: Population, images: int, replicates: int, on_suite: Callable[[int], None] = lambda done: None
) -> list[CoverageRow]:
    """Return the coverage of each measure's interval over drawn suites.

    Args:
        population: from which suites are drawn.
        images: in a drawn suite.
        replicates: number of drawn suites.
        on_suite: called with the number of finished suites.

    Returns:
        One row per measure, without a build.
    """
    truth = {name: figure for name, figure in population.figures().items() if name != _NOT_JUDGED and figure.value is not None}
    ends: dict[str, list[tuple[float, float, float]]] = {name: [] for name in truth}
    random = np.random.default_rng(_SEED)
    for done in range(replicates):
        figures = population.resampled(random.integers(0, population.images, images).tolist()).figures()
        for name, found in ends.items():
            found.append(_ends(figures.get(name, Figure(None))))
        on_suite(done + 1)
    return [_row(name, truth[name].value or 0.0, images, np.array(found)) for name, found in ends.items()]


def _counter(on_step: OnStep, what: str, total: int) -> Callable[[int], None]:
    return lambda done: on_step(what, done, total)


def _ends(figure: Figure) -> tuple[float, float, float]:
    return tuple(np.nan if end is None else end for end in (figure.value, figure.low, figure.high))  # type: ignore[return-value]


def _row(name: str, truth: float, images: int, found: np.ndarray) -> CoverageRow:
    """Return one row; `found` is (suites, 3) float64: value, low, high, or NaN for a suite without the measure."""
    found = found[np.isfinite(found).all(-1)]  # no lines of a task, or of too few images for any interval
    value, low, high = found.T
    slack = _ROUNDING * abs(truth)
    below, above = high < truth - slack, low > truth + slack
    holds = (low <= truth + slack) & (high >= truth - slack)
    reach = high / value if len(found) and value.min() > 0 else np.array([])
    return CoverageRow(
        measure=name,
        method=METHODS.get(kind_of(name), _TRANSFORMED_T),
        images=images,
        value=_short(truth),
        suites=len(found),
        coverage=_short(holds.mean()) if len(found) else None,
        below=_short(below.mean()) if len(found) else None,
        above=_short(above.mean()) if len(found) else None,
        width=_short((high - low).mean()) if len(found) else None,
        reach=_short(float(np.quantile(reach, 0.95))) if len(reach) else None,
        values=len(np.unique(value.round(12))),
    )


def _aggregate(suite: TokenizedSuite, reference: Session, build: Session, on_line: Callable[[int], None]) -> Aggregate:
    aggregate = Aggregate(dict.fromkeys(IMAGES_NEEDED, 2))
    for line, truth, found in zip(suite.lines, predictions(reference, suite), predictions(build, suite), strict=True):
        aggregate.add(line, measure_line(line, truth, found, reference.codec.decode))
        on_line(aggregate.total("lines"))
    return aggregate


def _session(folder: Path, label: str, export: dict[str, Any]) -> Session:
    budget = budget_without_limits(folder)
    goal = folder / label.replace(" ", "-").replace(",", "")
    exported = export_bundle("mini", target_named("cpu"), goal, golden_lines=2, budget=budget, method="rtn", **export)
    return load(Bundle.open(exported.directory))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
