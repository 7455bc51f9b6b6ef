"""Tables of `bench vision` (docs/results/vision.md): every precision of the vision graph, its effect on answers, the goals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cobra_edge.bench.spread import Spread

Row = dict[str, Any]
NOT_MEASURED, NO_VALUE = "not measured", "–"
# What was asked for: of a full-size tower, 16-bit graphs and int8 on two cores.
WRITE_SECONDS, WRITE_GIB = 15 * 60, 12
PARITY = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 5e-3}
INT8_TIMES, PRODUCT_SHARE, INT8_SIZE = 1.5, 0.6, 0.27


def vision_table(result: Row | None) -> str:
    """Return each precision of a shape as Markdown."""
    if result is None:
        return NOT_MEASURED
    rate, machine = result["matmul_gflops_per_second"], result["machine"]
    head = (
        f"{result['shape']}, {result['gflops']:,.1f} GFLOP an image, {machine['processor']}, "
        f"{result['threads']} threads; a large float32 product: {_spread(rate, '.0f')} GFLOP/s; medians of "
        f"{result['rounds']} rounds in turns, low and high in brackets."
    )
    columns = ["vision graph", "MB", "relative RMS from torch: encoders", "projector", "left float", "written in, min"]
    columns += ["peak then, GiB", "latency, ms", "times fp32", "of the product's rate", "peak when run, GiB"]
    lines = [head, "", _line(columns), "|---" * len(columns) + "|"]
    for row in result["rows"]:
        *encoders, projector = row["parity"].values()
        cells = [row["precision"], f"{row['bytes'] / 1e6:,.1f}", ", ".join(f"{e:.1e}" for e in encoders), f"{projector:.1e}"]
        cells += [str(len(row["wide"])) if row["precision"] == "int8" else NO_VALUE]
        cells += [f"{row['write_seconds'] / 60:.1f}", f"{row['write_peak_gib']:.1f}"]
        if "latency_ms" in row:
            cells += [_spread(row["latency_ms"], ",.1f"), f"{row['times_fp32']['median']:.2f}"]
            cells += [_spread(row["share_of_matmul_rate"], ".0%"), f"{row['run_peak_gib']:.2f}"]
        else:
            cells += ["not on a CPU", *[NO_VALUE] * 3]
        lines.append(_line(cells))
    return "\n".join(lines)


def engine_table(result: Row | None) -> str:
    """Return the engines built beside the graphs as Markdown."""
    rows = [row for row in result["rows"] if "engine" in row] if result else []
    if not rows:
        return NOT_MEASURED
    columns = ["engine", "library", "compute capability", "built in, s", "peak, GiB", "MB", "kernels"]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for row in rows:
        e = row["engine"]
        cells = [
            row["precision"],
            f"TensorRT for RTX {e['version']}",
            ", ".join(e["capabilities"]),
            f"{e['build_seconds']:.0f}",
        ]
        kernels = sum(count for kind, count in e["kernels"].items() if kind not in ("signal", "wait"))
        lines.append(_line([*cells, f"{e['build_peak_gib']:.1f}", f"{e['bytes'] / 1e6:,.1f}", str(kernels)]))
    return "\n".join(lines)


def answers_table(result: Row | None) -> str:
    """Return what each precision does to cobra-mini's answers as Markdown."""
    rows = (result or {}).get("answers", [])
    if not rows:
        return NOT_MEASURED
    tasks = list(rows[0]["accuracy"])
    columns = ["vision graph", "run by", "mean KLD (nats)", "its budget", "p99 KLD", "top-1", *tasks]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    for row in rows:
        kld, limit = row["kld_mean"], row["kld_mean_max"]
        cells = [row["precision"], row["runtime"], f"{kld['value']:.1e} ({kld['low']:.1e}–{kld['high']:.1e})"]
        cells += [NO_VALUE if limit is None else f"{limit:.0e}, {'within' if kld['value'] <= limit else '**beyond**'}"]
        cells += [f"{row['kld_p99']['value']:.1e}", f"{row['top1_agreement']['value']:.2%}"]
        cells += [f"{row['accuracy'][t]['right']:.1%} ({100 * row['accuracy'][t]['difference']['value']:+.1f})" for t in tasks]
        lines.append(_line(cells))
    return "\n".join(lines)


def vision_goals_table(full: Row | None, mini: Row | None) -> str:
    """Return the goals beside what was measured as Markdown."""
    lines = [_line(["goal", "measured", ""]), "|---" * 3 + "|"]
    for goal, value, form, within in [*(_full_goals(full) if full else ()), *_parity_goals(full, mini), *_answer_goals(mini)]:
        lines.append(_line([goal, f"{value:{form}}", "reached" if within else "**missed**"]))
    return "\n".join(lines)


def _full_goals(full: Row) -> Iterator[tuple[str, float, str, bool]]:
    rows = {row["precision"]: row for row in full["rows"]}
    half, small, wide = rows.get("fp16"), rows.get("int8"), rows.get("fp32")
    if half:
        seconds, peak = half["write_seconds"], half["write_peak_gib"]
        yield "full size: fp16 graph written within 15 min", seconds / 60, ".1f", seconds <= WRITE_SECONDS
        yield "full size: within 12 GiB", peak, ".1f", peak <= WRITE_GIB
    if small and wide:
        times, size = small["times_fp32"]["median"], small["bytes"] / wide["bytes"]
        yield "full size: int8 ≥ 1.5 × as fast as fp32 on a CPU", times, ".2f", times >= INT8_TIMES
        yield "full size: int8 about a quarter of fp32", size, ".1%", size <= INT8_SIZE
    if wide:
        share = wide["share_of_matmul_rate"]["median"]
        yield "full size: fp32 at ≥ 60 % of a large product's rate", share, ".0%", share >= PRODUCT_SHARE


def _parity_goals(*results: Row | None) -> Iterator[tuple[str, float, str, bool]]:
    for result in results:
        for row in result["rows"] if result else ():
            limit = PARITY.get(row["precision"])
            if limit is not None and result:
                worst = max(row["parity"].values())
                yield (
                    f"{result['shape']}: {row['precision']} within {limit:.0e} of torch everywhere",
                    worst,
                    ".1e",
                    worst <= limit,
                )


def _answer_goals(mini: Row | None) -> Iterator[tuple[str, float, str, bool]]:
    for row in (mini or {}).get("answers", []):
        limit = row["kld_mean_max"]
        if limit is not None:
            kld = row["kld_mean"]["value"]
            yield f"cobra-mini: {row['precision']} vision alone within its budget of {limit:.0e} nats", kld, ".1e", kld <= limit


def _spread(value: Spread, form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
