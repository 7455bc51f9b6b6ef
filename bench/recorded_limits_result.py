"""The result of `python -m bench.recorded_limits`, its tables, and the limits that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import Table
from cobra_edge.regress.gates import GATES
from cobra_edge.regress.recorded import OTHER, SAME

CHANGES = ("kld_change", "prompt_kld_change", "reply_change")
_TIMES = 3  # a limit over the largest measured difference
# Limits where nothing differed, or almost nothing.
_LEAST = {
    SAME: {"kld_change": 0.001, "prompt_kld_change": 0.001, "reply_change": 0.01},
    OTHER: {"kld_change": 0.1, "prompt_kld_change": 0.1, "reply_change": 0.01},
}
_HEAD = """\
# Limits of the gates that need no budget (docs/regression-harness.md), for every model. Made by
# `python -m bench.recorded_limits --write`: three times the largest difference that was measured.
"""


class Change(msgspec.Struct, frozen=True):
    """How far a runtime differs from the drift that the export of a build recorded; kind and measures as in `recorded`."""

    build: str
    runtime: str
    kind: str
    activations: str
    lines: int
    kld_change: float
    prompt_kld_change: float
    reply_change: float


class Alarms(msgspec.Struct, frozen=True):
    """One run of a good build on a part of its lines, about some images: the gates that failed."""

    images: int
    activations: str
    failed: tuple[str, ...]


class Foretold(msgspec.Struct, frozen=True):
    """Mean KLD in nats that gradients foretold for a build, the measured one, and `kld_over_expected`."""

    build: str
    expected: float
    measured: float
    ratio: float


class RecordedLimitsResult(msgspec.Struct, frozen=True, kw_only=True):
    """`python -m bench.recorded_limits`."""

    bench: str = "recorded-limits"
    changes: tuple[Change, ...]
    runs: tuple[Alarms, ...]
    foretold: tuple[Foretold, ...]
    machine: Machine


def _limit(values: Iterable[float], least: float) -> float:
    """Return three times the largest value, rounded up to two digits."""
    most = max(_TIMES * max(values), least)
    digits = 1 - math.floor(math.log10(most))
    return math.ceil(round(most * 10**digits, 6)) / 10**digits


def gate_limits_text(result: RecordedLimitsResult) -> str:
    """Return gates.toml."""
    text = _HEAD
    for kind, activations in sorted({(change.kind, change.activations) for change in result.changes}):
        # Another runtime differs at least as much as the same one.
        own = [c for c in result.changes if c.activations == activations and kind in (c.kind, OTHER)]
        limits = {measure: _limit((getattr(c, measure) for c in own), _LEAST[kind][measure]) for measure in CHANGES}
        rows = "\n".join(f"{measure} = {{ max = {limit:g} }}" for measure, limit in limits.items())
        text += f"\n[recorded.{kind}.{activations}]\n{rows}\n"
    ratios = [row.ratio for row in result.foretold]
    most, least = _limit(ratios, 1.0), 1 / _limit((1 / ratio for ratio in ratios), 1.0)
    return text + f"\n[expected]\nkld_over_expected = {{ max = {most:g}, min = {least:.2g} }}\n"


def changes_table(result: RecordedLimitsResult) -> Table:
    """Return a row for each build and runtime."""
    columns = ["build", "runtime", "than at the export", "activations", "lines", "KLD", "KLD on questions", "replies"]
    rows = [
        [
            c.build,
            c.runtime,
            c.kind,
            c.activations,
            str(c.lines),
            f"{c.kld_change:.2g}",
            f"{c.prompt_kld_change:.2g}",
            f"{c.reply_change:.2%}",
        ]
        for c in result.changes
    ]
    note = f"KLD: changes over those that bfloat16 would make. Commit {result.machine.commit}."
    return Table(columns, rows, "change since the export", notes=[note])


def foretold_table(result: RecordedLimitsResult) -> Table:
    """Return a row for each guided build."""
    rows = [[row.build, f"{row.expected:.2g}", f"{row.measured:.2g}", f"{row.ratio:.2g}"] for row in result.foretold]
    return Table(["build", "foretold", "measured", "ratio"], rows, "mean KLD in nats, foretold by gradients and measured")


def alarms_table(result: RecordedLimitsResult) -> Table:
    """Return false alarms by number of images."""
    gates = [name for name in GATES if name != "against"]  # which needs a flag
    rows = []
    for images in sorted({run.images for run in result.runs}):
        own = [run for run in result.runs if run.images == images]
        rows.append([str(images), str(len(own)), *(str(sum(gate in run.failed for run in own)) for gate in gates)])
    alarmed = sum(bool(run.failed) for run in result.runs)
    total = f"{alarmed} of {len(result.runs)} runs of good builds failed ({alarmed / len(result.runs):.1%})"
    return Table(["images", "runs", *gates], rows, "false alarms", notes=[total])
