"""The gate "against": line by line, a build compared with an earlier report or another bundle of the same model.

Both answer the same lines, so what makes a line hard cancels: with 64 lines a loss of a tenth shows that the intervals of two
separate reports hide. A build fails where it is worse beyond doubt, that is if the whole interval of the ratio is above what
another runtime may make of the same build.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.reader import MANIFEST, Bundle
from ..errors import InputError
from ..suite.tokenized import TokenizedSuite
from . import intervals
from .aggregate import IMAGES_NEEDED, Aggregate
from .budget import FLOOR
from .gates import Gate
from .golden import read_golden
from .journal import WHOLE, read_lines
from .report import Figure, Report, TooFew, Verdict, read_report

# {measure: column of `Aggregate`, column that it is counted in, the mean of the first by the second in a noise floor}
_MEASURES = {
    "kld_ratio": ("kld", "tokens", "kld_mean"),
    "prompt_kld_ratio": ("prompt_kld", "prompt_tokens", "prompt_kld_mean"),
}
_RUNTIMES = 0.1  # what runtimes may change, over what rounding to bfloat16 would: as of `recorded` (docs/regression-harness.md)
_NOTABLE = 1.05  # ratio from which it is said that it is not certain
Key = tuple[str | None, str, str]  # of a line: see `TokenizedSuite.key`


@dataclass(frozen=True, eq=False)
class Against:
    """What a build is compared with.

    Attributes:
        name: of the report or bundle.
        model, baseline: the model, and the kind of baseline, such as "golden".
        suite_sha256: of the suite that a report is of; None for a bundle.
        columns: (lines,) float64 each, by column of `Aggregate`.
        index: row of each line by its key, of a bundle; None for a report, whose rows are those of its suite.
    """

    name: str
    model: str
    baseline: str
    suite_sha256: str | None
    columns: dict[str, np.ndarray]
    index: dict[Key, int] | None = None


def open_against(path: Path) -> Against:
    """Read a bundle (its drift recorded by line), or a report: its directory, or report.json beside lines.jsonl.

    Raises:
        InputError: neither, of another version, without lines, or damaged.
    """
    if (path / MANIFEST).is_file():
        return _of_bundle(path)
    file = path / "report.json" if path.is_dir() else path
    return _of_report(file, read_report(file))


def _of_bundle(path: Path) -> Against:
    bundle = Bundle.open(path)
    manifest, suite = bundle.manifest, read_golden(bundle).suite
    drift = manifest.drift
    if drift is None or any(len(drift.by_line.get(column, ())) != len(suite.lines) for column, *_ in _MEASURES.values()):
        raise InputError(f"--against {path}: it records no drift by line, an earlier version exported it; give a report of it")
    columns = {column: np.array(drift.by_line[column]) for column, *_ in _MEASURES.values()}
    index = {suite.key(line): i for i, line in enumerate(suite.lines)}
    return Against(path.name, manifest.model.model_id, "golden", None, columns, index)


def _of_report(file: Path, report: Report) -> Against:
    lines = read_lines(file.parent / WHOLE)
    if len(lines) != report.suite.lines:
        raise InputError(
            f"--against {file}: {file.parent / WHOLE} has {len(lines)} lines, the report {report.suite.lines}; give the "
            "directory that `regress --report` wrote, with both files"
        )
    columns = {
        "kld": np.array([sum(line.answer_kld) for line in lines]),
        "prompt_kld": np.array([sum(line.prompt_kld) for line in lines]),
    }
    return Against(report.build.name, report.build.model, report.baseline.kind, report.suite.sha256, columns)


def lines_of(other: Against, model: str, baseline: str, suite: TokenizedSuite, suite_sha256: str) -> dict[str, np.ndarray]:
    """Return the other's columns for the lines of a suite, (lines,) float64 each, by column of `Aggregate`.

    Raises:
        InputError: it is of another model, baseline or suite.
    """
    flag = f"--against {other.name}"
    if other.model != model:
        raise InputError(f"{flag}: it is of {other.model}, this build of {model}; give one of this model")
    if other.baseline != baseline:
        raise InputError(
            f"{flag}: it was compared with a {other.baseline} baseline, this run with {baseline}; use one --baseline"
        )
    if other.index is None:
        if other.suite_sha256 != suite_sha256:
            raise InputError(
                f"{flag}: it is of another suite than {suite.name}, or of other lines of it; measure it on this one"
            )
        return other.columns
    rows = []
    for line in suite.lines:
        row = other.index.get(suite.key(line))
        if row is None:
            raise InputError(
                f"{flag}: its golden lines do not include line {line.number} of {suite.name}; export both with the same "
                "--golden, or give a report"
            )
        rows.append(row)
    return {name: values[rows] for name, values in other.columns.items()}


def against_gate(
    other: Mapping[str, np.ndarray] | None, aggregate: Aggregate, noise_floor: Mapping[str, Mapping[str, float]]
) -> Gate:
    """Judge the ratio of the build's KLD to the other's, paired by line and clustered by image.

    Args:
        other: see `lines_of`; None if there is none.
        aggregate: of the same lines in the same order.
        noise_floor: of the manifest.
    """
    if other is None:
        return Gate("nothing to compare with was given (--against)")
    images, figures, limits = aggregate.image_of_lines(), dict[str, Figure](), dict[str, float]()
    for measure, (column, counts, mean) in _MEASURES.items():
        now, before = (np.bincount(images, values, aggregate.images) for values in (aggregate.by_line(column), other[column]))
        if before.sum() > 0:
            figures[measure] = _ratio(now, before)
            kld, floor = before.sum() / aggregate.total(counts), noise_floor.get(FLOOR, {}).get(mean, 0.0)
            limits[measure] = float(f"{1 + _RUNTIMES * (2 * math.sqrt(kld * floor) + floor) / kld:.3g}")
    if not figures:
        return Gate("the other build does not drift at all, so nothing can be a multiple of it")
    return Gate("", figures, tuple(_verdict(measure, figure, limits[measure]) for measure, figure in figures.items()))


def _ratio(now: np.ndarray, before: np.ndarray) -> Figure:
    """Return the ratio of two sums over images, (images,) float64 each; without an interval if these are too few."""
    if len(now) < IMAGES_NEEDED["mean"]:
        return Figure(float(now.sum() / before.sum()), too_few=TooFew(len(now), IMAGES_NEEDED["mean"]))
    return Figure.of(intervals.ratio_of_means(now, before))


def _verdict(measure: str, figure: Figure, limit: float) -> Verdict:
    """Return a verdict that fails where the better end of the interval is above the limit."""
    if figure.too_few is not None:
        return Verdict(measure, "max", limit, None, False, f"{figure.too_few}: use a larger suite")
    surely = figure.value if figure.low is None else figure.low
    within = surely is not None and surely <= limit
    larger = within and figure.value is not None and figure.value > max(limit, _NOTABLE)
    return Verdict(measure, "max", limit, surely, within, "larger, but not beyond doubt: use more lines" if larger else "")
