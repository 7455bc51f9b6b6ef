"""The result of `python -m bench.quality`, its tables, and the goals of quantized builds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from cobra_edge.bench.machine import Machine
from cobra_edge.bench.tables import NO_VALUE, NOT_MEASURED, Table, verdict
from cobra_edge.regress.intervals import Interval

from .builds import DEFAULT, DEFAULT_ON_GPU

# Goals for the accuracy of cobra-mini in float on its held-out suite; captions are reported only.
GOALS = {"existence": 0.95, "spatial": 0.90, "attribute": 0.95, "count": 0.85}
# Goals for quantized builds.
EIGHT_BIT_PEER = "llama.cpp Q8_0"
# Mean KLD of a build as a share of a peer's: 1 / the last.
SHARES = (
    (DEFAULT_ON_GPU, "llama.cpp Q4_K_M", 6),
    (DEFAULT_ON_GPU, "bitsandbytes nf4", 12),
    (DEFAULT, "llama.cpp Q4_K_M", 6),
    (DEFAULT, "bitsandbytes nf4", 12),
    ("best, 3.5 bits", "llama.cpp Q4_K_M", 2),
)
LOST_AT_MOST = {DEFAULT_ON_GPU: 0.01, DEFAULT: 0.01, "best, 3.5 bits": 0.01, "best, w8a16-g128": 0.002}  # accuracy, in any task


class TaskAccuracy(msgspec.Struct, frozen=True):
    """Accuracy in one task: number of lines, share answered exactly, and its difference to the reference."""

    lines: int
    right: float
    difference: Interval


class SuiteFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Drift from the reference and accuracy on the held-out suite; KLD in nats, intervals are 95 %."""

    lines: int
    images: int
    answer_tokens: int
    kld_mean: Interval
    kld_p99: Interval
    top1_agreement: Interval
    perplexity_ratio: Interval
    accuracy: dict[str, TaskAccuracy]
    caption_perplexity: float | None


class KldComparison(msgspec.Struct, frozen=True):
    """Mean KLD of our build compared with that of a peer: difference, and ratio unless the peer's is 0."""

    kld_difference: Interval
    kld_ratio: Interval | None


class QualityRow(SuiteFigures, frozen=True, kw_only=True, omit_defaults=True):
    """One build or peer.

    Attributes:
        label: unique.
        kind: "reference", "ours" or "peer".
        weight_bits: bits of a code.
        bits_matrices, bits_all: bits per weight of the matrices, and of the whole decoder.
        runtime: name and version of what ran it.
        activations: data type of the matmuls' inputs.
        export: keyword arguments of `export_bundle`, of our builds.
        method, rotations: of our builds.
        draw: seed of its calibration lines; None for the embedded ones.
        left_float: what a peer leaves in float.
        against: our build compared with each peer.
    """

    label: str
    kind: str
    weight_bits: int
    bits_matrices: float
    bits_all: float
    runtime: str
    activations: str
    export: dict[str, Any] | None = None
    method: str | None = None
    rotations: tuple[str, ...] = ()
    draw: int | None = None
    left_float: str | None = None
    against: dict[str, KldComparison] = {}


class NotMeasured(msgspec.Struct, frozen=True):
    """A peer that was not measured, and why."""

    label: str
    weight_bits: int
    reason: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All rows, the reference first, then ours, then peers; and the largest mean KLD of each library's float form."""

    rows: tuple[QualityRow, ...]
    not_measured: tuple[NotMeasured, ...] = ()
    float_agreement: dict[str, float] = {}


class QualityResult(Comparison, frozen=True, kw_only=True, omit_defaults=True):
    """`python -m bench.quality`."""

    bench: str = "quality"
    model: str
    machine: Machine


def quality_table(result: Comparison) -> Table:
    """Return drift and accuracy of each build and peer, 95 % intervals of the KLD in brackets."""
    tasks = [*GOALS, "caption"]
    columns = ["build", "bits / weight: matrices", "all", "activations", "mean KLD (nats)", "p99 KLD", "top-1"]
    columns += ["perplexity ratio", *tasks]
    rows = []
    for row in result.rows:
        cells = [row.label, f"{row.bits_matrices:.2f}", f"{row.bits_all:.2f}", row.activations]
        cells += [interval_cell(row.kld_mean, ".2e"), interval_cell(row.kld_p99, ".1e"), f"{row.top1_agreement.value:.2%}"]
        rows.append([*cells, f"{row.perplexity_ratio.value:.4f}", *(f"{row.accuracy[t].right:.1%}" for t in tasks)])
    for missing in result.not_measured:
        rows.append([f"{missing.label} ({NOT_MEASURED}: {missing.reason})", *[NO_VALUE] * (len(columns) - 1)])
    return Table(columns, rows)


def quality_summary(result: Comparison) -> Table:
    """Return the columns of `quality_table` that fit a terminal."""
    tasks = list(result.rows[0].accuracy)
    rows = []
    for row in result.rows:
        cells = [row.label, f"{row.bits_matrices:.2f}", interval_cell(row.kld_mean, ".1e"), f"{row.top1_agreement.value:.2%}"]
        rows.append([*cells, *(f"{row.accuracy[task].right:.1%}" for task in tasks)])
    notes = [f"{missing.label}: {NOT_MEASURED}: {missing.reason}" for missing in result.not_measured]
    title = f"cobra-mini on {result.rows[0].lines} held-out lines"
    return Table(["build", "bits", "mean KLD", "top-1", *tasks], rows, title, notes)


def goals_table(result: Comparison) -> Table:
    """Return cobra-mini's accuracy in float and its goals."""
    row = result.rows[0]
    rows = []
    for task, goal in GOALS.items():
        found = row.accuracy[task]
        rows.append([task, str(found.lines), f"{found.right:.1%}", f"{goal:.0%}", verdict(found.right >= goal)])
    caption = row.accuracy["caption"]
    exact = f"{caption.right:.1%} exact, perplexity {row.caption_perplexity:.3f}"
    rows.append(["caption", str(caption.lines), exact, NO_VALUE, "reported"])
    return Table(["task", "held-out lines", "correct", "goal", ""], rows)


def quality_goals_table(result: Comparison) -> Table:
    """Return goals of quantized builds and measurements.

    The value itself is judged; the cell says so if its 95 % interval contains the limit.
    """
    return Table(["goal", "build", "measured", ""], list(_goals(result)))


def _goals(result: Comparison) -> Iterator[list[str]]:
    ours, by_label = rows_of(result, "ours"), {row.label: row for row in result.rows}
    for label, peer, divisor in SHARES:
        share = "" if divisor == 1 else f"1/{divisor} of "
        yield _below(f"mean KLD at most {share}that of {peer}", by_label.get(label), peer, 1 / divisor)
    four_bit_peers = [p.label for p in rows_of(result, "peer") if p.weight_bits == 4]
    four_bit_peers += [p.label for p in result.not_measured if p.weight_bits == 4]
    for peer in four_bit_peers:
        yield _below(f"mean KLD below that of {peer}", by_label.get(DEFAULT_ON_GPU), peer, 1)
    for row in [r for r in result.rows if r.label == EIGHT_BIT_PEER]:
        within = [r for r in ours if r.weight_bits == 8 and r.bits_matrices <= row.bits_matrices]
        yield _below(f"8 bits: mean KLD below that of {EIGHT_BIT_PEER}", _best(within), EIGHT_BIT_PEER, 1)
    for label, lost in LOST_AT_MOST.items():
        goal = f"every task within {100 * lost:g} point{'s' * (lost != 0.01)} of float"
        yield _every_task(goal, by_label.get(label), lost)


def draws_table(result: Comparison) -> Table:
    """Return the default with other calibration lines of the same kind: median and range of the mean KLD."""
    by_label = {row.label: row for row in result.rows}
    first = by_label.get(DEFAULT_ON_GPU)
    values = [row.kld_mean.value for row in (first, *(r for r in result.rows if r.draw is not None)) if row is not None]
    if len(values) < 2:
        return Table(["build", "draws", "median", "range"], [])
    cells = [f"{statistics.median(values):.2e}", f"{min(values):.2e}–{max(values):.2e}"]
    return Table(
        ["build", "draws of calibration lines", "median of the mean KLD", "range"], [[DEFAULT_ON_GPU, str(len(values)), *cells]]
    )


def rows_of(result: Comparison, kind: str) -> list[QualityRow]:
    """Return the rows of a kind: "ours" or "peer"."""
    return [row for row in result.rows if row.kind == kind]


def _best(rows: Iterable[QualityRow]) -> QualityRow | None:
    """Return the row of smallest mean KLD; None if there are none."""
    return min(rows, key=lambda row: row.kld_mean.value, default=None)


def _below(goal: str, ours: QualityRow | None, peer: str, at_most: float) -> list[str]:
    compared = ours.against.get(peer) if ours else None
    if ours is None or compared is None or compared.kld_ratio is None:
        return [goal, ours.label if ours else NO_VALUE, NOT_MEASURED, ""]
    ratio = compared.kld_ratio
    return [goal, ours.label, f"{interval_cell(ratio, '.3f')} times", _interval_verdict(ratio, lambda v: v <= at_most)]


def _every_task(goal: str, ours: QualityRow | None, lost: float) -> list[str]:
    if ours is None:
        return [goal, NO_VALUE, NOT_MEASURED, ""]
    differences = ((task, found.difference) for task, found in ours.accuracy.items())
    task, worst = min(differences, key=lambda pair: (pair[1].value, pair[1].low))
    points, allowed = worst.map(lambda share: 100 * share), -100 * lost - 1e-9
    cells = [f"{task} {interval_cell(points, '+.1f')}", _interval_verdict(points, lambda v: v >= allowed)]
    return [goal, ours.label, *cells]


def _interval_verdict(interval: Interval, within: Callable[[float], bool]) -> str:
    word = verdict(within(interval.value))
    return word if within(interval.low) == within(interval.high) else f"{word}, but the interval contains the limit"


def interval_cell(interval: Interval, form: str) -> str:
    """Return "value (low–high)", each in this format."""
    return f"{interval.value:{form}} ({interval.low:{form}}–{interval.high:{form}})"
