"""The result of `python -m bench.interval_coverage`, and its tables."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import NO_VALUE, Table
from cobra_edge.regress.aggregate import IMAGES_NEEDED, kind_of

LEAST, MOST = 0.93, 0.97  # goal for the coverage of a 95 % interval
WORTH_GIVING = 0.9  # coverage from which an interval is worth giving
FEW_VALUES = 100  # a measure with no more values is too coarse for its interval to reach 95 %: one or two lines fail
# The simulated images with the spread of cobra-mini's in mean KLD: their mean counts for `images_needed`.
LIKE_OURS, _MEAN = "log-normal, σ = 1", "kld_mean"
DOMINATED = ("ratio",)  # kinds of which single images make the figure; no number of images is enough


class CoverageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one build, over drawn suites of one size.

    Attributes:
        build: label of the build, or name of the simulated population; "" until it is known.
        measure: its name.
        method: of the interval.
        images: in a drawn suite.
        value: of the whole suite.
        suites: number of drawn suites that have the measure and an interval.
        coverage: share of those whose interval contains the value of the whole suite.
        below, above: shares of those whose interval lies below and above it.
        width: mean width of the intervals.
        reach: 95th percentile of the upper bound divided by the value; None if some value is 0 or below.
        values: number of different values of the measure.
    """

    build: str = ""
    measure: str
    method: str
    images: int
    value: float
    suites: int
    coverage: float | None
    below: float | None
    above: float | None
    width: float | None
    reach: float | None
    values: int


class CoverageResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.interval_coverage`; `rows` are of builds of the model, `tails` of simulated populations."""

    bench: str = "interval-coverage"
    model: str
    replicates: int
    rows: tuple[CoverageRow, ...]
    tails: tuple[CoverageRow, ...]
    machine: Machine


def coverage_table(result: CoverageResult) -> Table:
    """Return the coverage of each measure's interval, the lowest of all builds, with a column for each size."""
    sizes = _sizes(result.rows)
    cells = []
    for name in dict.fromkeys(row.measure for row in result.rows):
        of = [row for row in result.rows if row.measure == name]
        cells.append([f"`{name}`", of[0].method, *(_lowest([row for row in of if row.images == size]) for size in sizes)])
    return Table(["measure", "method", *(f"{size} images" for size in sizes)], cells, notes=[_note(result)])


def tails_table(result: CoverageResult) -> Table:
    """Return the coverage of intervals in simulated populations, and how far their upper bounds reach."""
    sizes = _sizes(result.tails)
    by_place = {(row.build, row.measure, row.images): row for row in result.tails}
    cells = [
        [build, f"`{measure}`", *(_with_reach(by_place[build, measure, size]) for size in sizes)]
        for build, measure in dict.fromkeys((row.build, row.measure) for row in result.tails)
    ]
    return Table(["images", "measure", *(f"{size} images" for size in sizes)], cells, notes=[_note(result)])


def needed_table(result: CoverageResult) -> Table:
    """Return how many images an interval of each kind of measure needs, with its lowest coverage there."""
    cells = []
    for kind, needed in IMAGES_NEEDED.items():
        coarse = [row for row in _of(result, kind) if row.images == needed and row.values > 1]
        rows = [row for row in _counting(result, kind) if row.images == needed] or coarse
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(row.measure for row in _of(result, kind)) if "." not in name)
        reach = max((row.reach for row in rows if row.reach is not None), default=None)
        lowest = min((row.coverage for row in rows if row.coverage is not None), default=None)
        cells.append(
            [
                names,
                str(needed),
                NO_VALUE if lowest is None else f"{lowest:.1%}",
                NO_VALUE if reach is None else f"× {reach:.3g}",
            ]
        )
    return Table(["measures", "images needed", "lowest coverage there", "upper bound / value"], cells, notes=[_note(result)])


def images_needed(result: CoverageResult, kind: str) -> int | None:
    """Return the least size from which on intervals of this kind are worth giving, in all builds; None if none is."""
    enough = None
    for size in reversed(_sizes(result.rows)):
        rows = [row for row in _counting(result, kind) if row.images == size]
        if any((row.coverage or 0.0) < WORTH_GIVING for row in rows):
            break
        enough = size
    return enough


def _of(result: CoverageResult, kind: str) -> list[CoverageRow]:
    return [row for row in result.rows if kind_of(row.measure) == kind]


def _counting(result: CoverageResult, kind: str) -> list[CoverageRow]:
    """Return the rows that count for a kind: of builds, and the mean of images like ours, of measures that are not coarse."""
    tails = [row for row in result.tails if (row.build, row.measure) == (LIKE_OURS, _MEAN) and kind_of(_MEAN) == kind]
    return [row for row in (*_of(result, kind), *tails) if row.values > FEW_VALUES]


def _sizes(rows: Sequence[CoverageRow]) -> list[int]:
    return sorted({row.images for row in rows})


def _note(result: CoverageResult) -> str:
    return f"{result.replicates} drawn suites of each size, commit {result.machine.commit}."


def _lowest(rows: Sequence[CoverageRow]) -> str:
    """Return the lowest coverage: of builds where the measure is not coarse, else of those where it is not constant."""
    fine = [row for row in rows if row.values > FEW_VALUES] or [row for row in rows if row.values > 1]
    if not fine:
        return "constant"
    row = min(fine, key=lambda row: row.coverage or 0.0)
    if row.coverage is None:
        return NO_VALUE
    share = f"{row.coverage:.1%}"
    if row.values <= FEW_VALUES:
        return f"{share} ({row.values} values)"
    return share if LEAST <= row.coverage <= MOST else f"**{share}**"


def _with_reach(row: CoverageRow) -> str:
    reach = "" if row.reach is None else f", × {row.reach:.3g}"
    return f"{_lowest([row])}{reach}"
