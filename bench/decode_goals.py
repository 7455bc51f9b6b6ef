"""Decoding speed on a CPU: the table of docs/results/cpu.md, and the goals of the native decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from cobra_edge.bench.decode_result import CpuDecodeResult, CpuDecodeRow, RunnerResult
from cobra_edge.bench.tables import NO_VALUE, NOT_MEASURED, Table, judged

# Goals, compared with the peer of the same bits in the same run.
DECODE_RATIO, DECODE_RATIO_AIM, PREFILL_RATIO = 1.5, 1.8, 2.0
DECODE_SHARE, CONTEXT_TOLERANCE, OPEN_SECONDS = 0.80, 0.03, 1.0
_WIDEST_FIRST = ("AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "MATMUL_INT8", "DOTPROD", "NEON")  # names of llama.cpp


def decode_table(result: CpuDecodeResult) -> Table:
    """Return speed by scheme and runner."""
    rows, m = result.rows, result.machine
    prompts, context = rows[0].prompt_tokens, rows[0].contexts[0]
    reads = " / ".join(f"{row.limits.read_gb_s.median:.1f}" for row in rows)
    title = f"{result.model}, {result.weights} weights, on {m.processor}, {m.cores} cores, {m.memory_gb} GB: "
    title += f"{rows[0].threads} threads, batch 1, {rows[0].rounds} rounds, median (low–high); memory bandwidth in the same "
    title += f"runs {reads} GB/s; commit {m.commit}."
    columns = ["scheme", "decoder", "kernels", f"decode at {context}, tok/s", "share of the bandwidth bound"]
    columns += [f"prefill {n}, tok/s" for n in prompts]
    columns += ["speedup over the peer: decode", *(f"prefill {n}" for n in prompts)]
    return Table(columns, [_cells(row, runner) for row in rows for runner in row.runners], title)


def _cells(row: CpuDecodeRow, runner: RunnerResult) -> list[str]:
    context = row.contexts[0]
    rates = [f"decode_at_{context}_tok_s", *(f"prefill_{n}_tok_s" for n in row.prompt_tokens)]
    speeds = [runner.figures[rate].cell(".1f") if rate in runner.figures else NOT_MEASURED for rate in rates]
    share = runner.figures.get(f"decode_at_{context}_share")
    speeds.insert(1, f"{share.median:.0%}" if share else NOT_MEASURED)
    ratios = row.ratios.get(runner.name, {})
    name = f"{runner.name} ({runner.version})" if runner.version else runner.name
    speedups = [f"{ratios[rate].median:.2f}" if rate in ratios else NO_VALUE for rate in rates]
    return [row.scheme, name, _kernels(runner), *speeds, *speedups]


def _kernels(runner: RunnerResult) -> str:
    """Return the instruction set; for llama.cpp the widest that it was built for."""
    if runner.kernels:
        return runner.kernels
    has = set(re.findall(r"(\w+) = 1\b", runner.built_for or ""))
    return next((name for name in _WIDEST_FIRST if name in has), NO_VALUE)


def decode_goals_table(results: Sequence[CpuDecodeResult]) -> Table:
    """Return goals and measurements, with a column for each data type of activations and instruction set."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}  # by scheme, measure and goal; a cell for each column
    for result in results:
        for row in result.rows:
            columns = {r.name: f"{r.name}, {_kernels(r)}" for r in _ours(row)}
            for measure, goal, cells in _goals(row):
                place = found.setdefault((row.scheme, measure, goal), {})
                place |= {columns[name]: cell for name, cell in cells.items()}
    names = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = [[*what, *(cells.get(name, NO_VALUE) for name in names)] for what, cells in found.items()]
    return Table(["scheme", "measure", "goal", *names], rows)


def _ours(row: CpuDecodeRow) -> list[RunnerResult]:
    return [runner for runner in row.runners if runner.name != row.peer]


def _goals(row: CpuDecodeRow) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield measure, goal and a cell for each of our runners."""
    ours, contexts = _ours(row), sorted(row.contexts)
    first = row.contexts[0]

    def ratio(figure: str, least: float) -> dict[str, str]:
        of = {r.name: row.ratios.get(r.name, {}).get(figure) for r in ours}
        return {name: _cell(value.median if value else None, lambda v: v >= least, ".2f") for name, value in of.items()}

    def figure(name: str) -> dict[str, float | None]:
        return {r.name: r.figures[name].median if name in r.figures else None for r in ours}

    yield "decode", f"≥ {DECODE_RATIO} × the peer, aim {DECODE_RATIO_AIM}", ratio(f"decode_at_{first}_tok_s", DECODE_RATIO)
    shares = figure(f"decode_at_{first}_share")
    goal = f"≥ {DECODE_SHARE:.0%} of the bandwidth bound"
    yield "decode", goal, {name: _cell(v, lambda v: v >= DECODE_SHARE, ".0%") for name, v in shares.items()}
    for n in row.prompt_tokens:
        yield f"prefill {n}", f"≥ {PREFILL_RATIO:g} × the peer", ratio(f"prefill_{n}_tok_s", PREFILL_RATIO)
    if len(contexts) > 1:
        steady = figure(f"decode_{contexts[-1]}_over_{contexts[0]}")
        measure, goal = f"decode at {contexts[-1]} / at {contexts[0]}", f"within {CONTEXT_TOLERANCE:.0%}"
        yield measure, goal, {n: _cell(v, lambda v: abs(v - 1) <= CONTEXT_TOLERANCE, ".3f") for n, v in steady.items()}
    startup = row.startup
    opened = next(r.name for r in ours if r.activations == startup.activations)
    cell = _cell(startup.open_seconds, lambda v: v < OPEN_SECONDS, ".2f")
    cell += f" (first opening, every file hashed: {startup.first_open_seconds:.2f})"
    yield "seconds to open", f"< {OPEN_SECONDS:g}", {opened: cell}
    peak, limit = startup.peak_bytes, startup.limit_bytes
    yield "peak memory, GB", f"≤ {limit / 1e9:.2f}", {opened: _cell(peak / 1e9, lambda v: v * 1e9 <= limit, ".2f")}


def _cell(value: float | None, within: Callable[[float], bool], form: str) -> str:
    return judged(value, value is not None and within(value), form)
