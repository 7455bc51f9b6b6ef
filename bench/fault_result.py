"""The result of `python -m bench.fault_injection`, and its table."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import NO_VALUE, Table


class FaultRow(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, injected several times.

    Attributes:
        name: unique.
        description: what is broken.
        build: that it is injected into.
        draws: how often it was injected, each time at another place.
        caught: how often cobra-mini's own budget was exceeded, or the run failed.
        caught_by_shipped: how often the budget that ships was exceeded, or the run failed.
        expected: measures that should show it.
        expected_failed: how often one of these did.
        exit_codes: of `regress`, by draw.
        failed: how often each measure exceeded its limit.
        worst: the measure furthest beyond its limit, most often.
        worst_times: how many times its distance from the ideal is that of the limit, at most.
        refused: message of a run that failed, or "".
        detected_against_good_build: how often a fault that was not caught shows with the good build as baseline.
    """

    name: str
    description: str
    build: str
    draws: int
    caught: int
    caught_by_shipped: int
    expected: tuple[str, ...]
    expected_failed: int
    exit_codes: tuple[int, ...]
    failed: dict[str, int]
    worst: str | None
    worst_times: float | None
    refused: str
    detected_against_good_build: int = 0


class FaultResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.fault_injection`."""

    bench: str = "fault-injection"
    model: str
    rows: tuple[FaultRow, ...]
    machine: Machine


def faults_table(result: FaultResult) -> Table:
    """Return one row per fault."""
    columns = ["fault", "build", "caught", "by the shipped budget", "by the expected measure", "furthest beyond its limit"]
    columns.append("not caught, but detected against the good build")
    caught, injected = sum(row.caught for row in result.rows), sum(row.draws for row in result.rows)
    shipped = sum(row.caught_by_shipped for row in result.rows)
    total = f"{injected} injected faults: {caught} caught by cobra-mini's own budget, {shipped} by the shipped one"
    return Table(columns, [_cells(row) for row in result.rows], notes=[f"{total}. Commit {result.machine.commit}."])


def _cells(row: FaultRow) -> list[str]:
    of = f"of {row.draws}"
    layers = any(name.startswith("state_error.") for name in row.expected)
    expected = " or ".join(f"`{name}`" for name in row.expected if not name.startswith("state_error."))
    expected += " or a layer's" if layers else ""
    furthest = f"`{row.worst}`, {row.worst_times:.2g} times" if row.worst else NO_VALUE
    if row.refused:
        furthest = f"refused with exit code {row.exit_codes[0]}"
    missed = f"{row.detected_against_good_build} of {row.draws - row.caught}" if row.caught < row.draws else NO_VALUE
    cells = [row.description, f"`{row.build}`", f"{row.caught} {of}", f"{row.caught_by_shipped} {of}"]
    return [*cells, f"{expected}: {row.expected_failed} {of}" if expected else NO_VALUE, furthest, missed]
