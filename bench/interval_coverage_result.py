"""The result of `python -m bench.interval_coverage`, and its tables."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import NO_VALUE, Table

LEAST, MOST = 0.93, 0.97  # goal for the coverage of a 95 % interval
FEW_VALUES = 100  # a measure with no more values is too coarse for its interval to reach 95 %: one or two lines fail


class CoverageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one build, over drawn suites of one size.

    Attributes:
        build: label of the build; "" until it is known.
        measure: its name.
        method: of the interval.
        images: in a drawn suite.
        value: of the whole suite.
        coverage: share of drawn suites whose interval contains the value of the whole suite.
        below, above: shares of those whose interval lies below and above it.
        width: mean width of the intervals; None if none is finite.
        values: number of different values of the measure.
    """

    build: str = ""
    measure: str
    method: str
    images: int
    value: float
    coverage: float
    below: float
    above: float
    width: float | None
    values: int


class CoverageResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.interval_coverage`."""

    bench: str = "interval-coverage"
    model: str
    replicates: int
    rows: tuple[CoverageRow, ...]
    machine: Machine


def coverage_table(result: CoverageResult, *, small: bool) -> Table:
    """Return the coverage of each measure's interval, with a column for each build.

    Args:
        result: to show.
        small: the small suites; else those as large as the whole suite.
    """
    sizes = sorted({row.images for row in result.rows})
    images = sizes[0] if small else sizes[-1]
    rows = [row for row in result.rows if row.images == images]
    builds = list(dict.fromkeys(row.build for row in rows))
    by_place = {(row.measure, row.build): row for row in rows}
    cells = []
    for name in dict.fromkeys(row.measure for row in rows):
        found = [by_place.get((name, build)) for build in builds]
        method = next(row.method for row in found if row is not None)
        cells.append([f"`{name}`", method, *(_cell(row) for row in found)])
    note = f"{images} images, {result.replicates} drawn suites, commit {result.machine.commit}."
    return Table(["measure", "method", *builds], cells, notes=[note])


def _cell(row: CoverageRow | None) -> str:
    """Return the coverage, and the reason if it misses the goal."""
    if row is None:
        return NO_VALUE
    share = f"{row.coverage:.1%}"
    if row.values == 1:
        return f"{share} (constant)"
    if LEAST <= row.coverage <= MOST:
        return share
    return f"{share} ({row.values} values)" if row.values <= FEW_VALUES else f"**{share}**"
