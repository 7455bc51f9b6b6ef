"""The vision graph's effect on cobra-mini's answers, and the goals of the vision graph (docs/results/vision.md)."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cobra_edge.bench.tables import NO_VALUE, Table, verdict
from cobra_edge.bench.vision_result import VisionResult, VisionRow

from .quality_result import SuiteFigures, interval_cell

# Goals for a full-size tower: writing the fp16 graph, distance from torch, int8 on two cores.
WRITE_SECONDS, WRITE_GIB = 15 * 60, 12
PARITY = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-3}
INT8_SPEEDUP, MATMUL_SHARE, INT8_SIZE = 1.5, 0.6, 0.27


class VisionAnswers(SuiteFigures, frozen=True, kw_only=True):
    """Answers with the embeddings of one precision, compared with those of torch in float32.

    Attributes:
        precision: of the graph.
        runtime: that ran it.
        kld_mean_max: limit of the shipped budget, or None.
    """

    precision: str
    runtime: str
    kld_mean_max: float | None


class MiniVisionResult(VisionResult, frozen=True, kw_only=True, omit_defaults=True):
    """`python -m bench.vision`: `bench vision` of cobra-mini, and its answers with each precision."""

    answers: tuple[VisionAnswers, ...] = ()


def answers_table(result: MiniVisionResult) -> Table:
    """Return the effect of each precision on the answers of cobra-mini."""
    tasks = list(result.answers[0].accuracy) if result.answers else []
    rows = []
    for row in result.answers:
        kld, limit = row.kld_mean, row.kld_mean_max
        cells = [row.precision, row.runtime, interval_cell(kld, ".1e")]
        cells += [NO_VALUE if limit is None else f"{limit:.0e}, {'within' if kld.value <= limit else '**exceeded**'}"]
        cells += [f"{row.kld_p99.value:.1e}", f"{row.top1_agreement.value:.2%}"]
        found = (row.accuracy[task] for task in tasks)
        rows.append([*cells, *(f"{a.right:.1%} ({100 * a.difference.value:+.1f})" for a in found)])
    return Table(["vision graph", "run by", "mean KLD (nats)", "budget", "p99 KLD", "top-1", *tasks], rows)


class _Goal(msgspec.Struct, frozen=True):
    """A goal, its measured value with its format, and whether it was reached."""

    goal: str
    value: float
    form: str
    reached: bool


def vision_goals_table(full: VisionResult | None, mini: MiniVisionResult | None) -> Table:
    """Return goals and measurements."""
    goals = [*(_full_size(full) if full else ()), *_parity(full), *_parity(mini), *_answers(mini)]
    return Table(["goal", "measured", ""], [[g.goal, f"{g.value:{g.form}}", verdict(g.reached)] for g in goals])


def _full_size(full: VisionResult) -> Iterator[_Goal]:
    rows: dict[str, VisionRow] = {row.precision: row for row in full.rows}
    fp16, int8, fp32 = rows.get("fp16"), rows.get("int8"), rows.get("fp32")
    if fp16:
        seconds, peak = fp16.write_seconds, fp16.write_peak_gib
        yield _Goal("full size: fp16 graph written within 15 min", seconds / 60, ".1f", seconds <= WRITE_SECONDS)
        yield _Goal("full size: within 12 GiB", peak, ".1f", peak <= WRITE_GIB)
    if int8 and fp32:
        if int8.times_fp32:
            speedup = int8.times_fp32.median
            yield _Goal("full size: int8 ≥ 1.5 × as fast as fp32 on a CPU", speedup, ".2f", speedup >= INT8_SPEEDUP)
        size = int8.bytes / fp32.bytes
        yield _Goal("full size: int8 about a quarter of fp32", size, ".1%", size <= INT8_SIZE)
    if fp32 and fp32.share_of_matmul_rate:
        share = fp32.share_of_matmul_rate.median
        yield _Goal("full size: fp32 at ≥ 60 % of the rate of a large matmul", share, ".0%", share >= MATMUL_SHARE)


def _parity(result: VisionResult | None) -> Iterator[_Goal]:
    for row in result.rows if result else ():
        limit, worst = PARITY.get(row.precision), max(row.parity.values())
        if limit is not None and result:
            yield _Goal(f"{result.shape}: {row.precision} within {limit:.0e} of torch", worst, ".1e", worst <= limit)


def _answers(mini: MiniVisionResult | None) -> Iterator[_Goal]:
    for row in mini.answers if mini else ():
        limit, kld = row.kld_mean_max, row.kld_mean.value
        if limit is not None:
            goal = f"cobra-mini: {row.precision} vision alone within its budget of {limit:.0e} nats"
            yield _Goal(goal, kld, ".1e", kld <= limit)
