"""The result of `python -m bench.regress`, and its table."""

from __future__ import annotations

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import Table


class BaselineCost(msgspec.Struct, frozen=True):
    """Wall time and peak memory of a run, attribution included, by scheme and baseline."""

    scheme: str
    baseline: str
    lines: int
    rounds: int
    seconds: Spread
    peak_mib: Spread


class LengthCost(msgspec.Struct, frozen=True):
    """Wall time and peak memory of a run without attribution, by number of lines."""

    lines: int
    peak_mib: Spread
    seconds: Spread


class SuiteCosts(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a run of the regression harness."""

    rows: tuple[BaselineCost, ...]
    lengths: tuple[LengthCost, ...]


class SuiteCostResult(SuiteCosts, frozen=True, kw_only=True):
    """`python -m bench.regress`."""

    bench: str = "regress"
    model: str
    machine: Machine


def suite_cost_table(result: SuiteCostResult) -> Table:
    """Return wall time and peak memory, by baseline and by number of lines."""
    m, rounds = result.machine, result.rows[0].rounds
    title = f"{m.processor}, {m.cores} cores; the whole command, median (low–high) of {rounds} alternating runs."
    rows = [
        [f"{r.scheme}, with attribution", r.baseline, f"{r.lines:,}", r.seconds.cell(".1f"), r.peak_mib.cell(".0f")]
        for r in result.rows
    ]
    scheme = f"{result.rows[0].scheme}, without attribution"
    rows += [[scheme, "fp16 bundle", f"{r.lines:,}", r.seconds.cell(".1f"), r.peak_mib.cell(".0f")] for r in result.lengths]
    return Table(["build", "baseline", "lines", "seconds", "peak memory, MiB"], rows, title)
