"""The result of `python -m bench.fault_injection`, and its table."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import NO_VALUE, Table
from cobra_edge.regress.gates import GATES


class FaultRow(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, injected several times.

    Attributes:
        name: unique.
        description: what is broken.
        build: that it is injected into.
        draws: how often it was injected, each time at another place.
        caught: how often cobra-mini's own budget was exceeded, or the run failed.
        caught_by_shipped: how often one of the gates that ship failed, or the run did.
        gates: how often each of these gates failed.
        expected: measures that should show it.
        expected_failed: how often one of these did.
        exit_codes: of `regress`, by draw.
        failed: how often each measure exceeded its limit.
        worst: the measure furthest beyond its limit, most often.
        worst_times: how many times its distance from the ideal is that of the limit, at most.
        refused: message of a run that failed, or "".
    """

    name: str
    description: str
    build: str
    draws: int
    caught: int
    caught_by_shipped: int
    gates: dict[str, int] = {}
    expected: tuple[str, ...]
    expected_failed: int
    exit_codes: tuple[int, ...]
    failed: dict[str, int]
    worst: str | None
    worst_times: float | None
    refused: str


class FaultResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.fault_injection`."""

    bench: str = "fault-injection"
    model: str
    rows: tuple[FaultRow, ...]
    machine: Machine


def faults_table(result: FaultResult) -> Table:
    """Return one row per fault."""
    gates = [name for name in GATES if name != "against"]  # which needs a flag
    columns = ["fault", "build", "caught", *gates, "by cobra-mini's own budget", "its furthest measure"]
    caught, injected = sum(row.caught_by_shipped for row in result.rows), sum(row.draws for row in result.rows)
    of_gate = ", ".join(f"{name} {sum(row.gates.get(name, 0) for row in result.rows)}" for name in gates)
    refused = sum(row.draws for row in result.rows if row.refused)
    total = (
        f"{injected} injected faults: {caught} caught without a flag ({caught / injected:.1%}): by gate {of_gate}, refused "
        f"{refused}; {sum(row.caught for row in result.rows)} by cobra-mini's own budget"
    )
    return Table(columns, [_cells(row, gates) for row in result.rows], notes=[f"{total}. Commit {result.machine.commit}."])


def _cells(row: FaultRow, gates: list[str]) -> list[str]:
    of = f"of {row.draws}"
    furthest = f"`{row.worst}`, {row.worst_times:.2g} times" if row.worst else NO_VALUE
    if row.refused:
        furthest = f"refused with exit code {row.exit_codes[0]}"
    by_gate = [str(row.gates[name]) if name in row.gates else NO_VALUE for name in gates]
    cells = [row.description, f"`{row.build}`", f"{row.caught_by_shipped} {of}", *by_gate]
    return [*cells, f"{row.caught} {of}", furthest]
