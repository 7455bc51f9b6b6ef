"""Tables of decoding speed on a CPU (docs/results/cpu.md), from the results of `cobra-edge bench decode`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cobra_edge.bench.spread import Spread

NOT_MEASURED = "not measured"
# What the native decoder was asked to reach, against the peer of the same bits in the same run.
DECODE_RATIO, DECODE_RATIO_AIM, PREFILL_RATIO = 1.5, 1.8, 2.0
DECODE_SHARE, CONTEXT_TOLERANCE, OPEN_SECONDS = 0.80, 0.03, 1.0
_NO_VALUE = "–"
_WIDEST_FIRST = ("AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "AVX", "MATMUL_INT8", "DOTPROD", "NEON")  # as llama.cpp says it

Result = dict[str, Any]


def decode_table(found: Sequence[Result]) -> str:
    """Return speed by scheme and runner as Markdown, a table for each result, each below a line about its machine."""
    return "\n\n".join(_speed(result) for result in found) if found else NOT_MEASURED


def decode_goals_table(found: Sequence[Result]) -> str:
    """Return the goals of the native decoder beside what was measured, a column for each form of activations and kernels."""
    if not found:
        return NOT_MEASURED
    judged: dict[tuple[str, str, str], dict[str, str]] = {}  # by scheme, measure and goal; a cell for each column
    for result in found:
        for row in result["rows"]:
            columns = {c["name"]: f"{c['name']}, {_kernels(c)}" for c in _ours(row)}
            for measure, goal, cells in _goals(row):
                place = judged.setdefault((row["scheme"], measure, goal), {})
                place |= {columns[name]: cell for name, cell in cells.items()}
    names = list(dict.fromkeys(name for cells in judged.values() for name in cells))
    lines = [_line(["scheme", "measure", "goal", *names]), "|---" * (len(names) + 3) + "|"]
    lines += [_line([*what, *(cells.get(name, _NO_VALUE) for name in names)]) for what, cells in judged.items()]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ours(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for c in row["runners"] if c["name"] != row["peer"]]


def _speed(result: Result) -> str:
    rows, m = result["rows"], result["machine"]
    prompts, context = rows[0]["prompt_tokens"], rows[0]["contexts"][0]
    reads = " / ".join(f"{row['limits']['read_gb_s']['median']:.1f}" for row in rows)
    head = f"{result['model']}, {result['weights']} weights, on {m['processor']}, {m['cores']} cores, {m['memory_gb']} GB: "
    head += f"{rows[0]['threads']} threads, batch 1, {rows[0]['rounds']} rounds, median (low–high); read bandwidth in the same "
    head += f"runs {reads} GB/s; commit {m['commit']}."
    columns = ["scheme", "decoder", "kernels", f"decode at {context}, tok/s", "of the bandwidth bound"]
    columns += [f"prefill {n}, tok/s" for n in prompts]
    columns += ["times the peer: decode", *(f"prefill {n}" for n in prompts)]
    rates = [f"decode_at_{context}_tok_s", *(f"prefill_{n}_tok_s" for n in prompts)]
    lines = [head, "", _line(columns), "|---" * len(columns) + "|"]
    for row in rows:
        for c in row["runners"]:
            speeds = [_spread(c["figures"].get(rate)) for rate in rates]
            share = c["figures"].get(f"decode_at_{context}_share")
            speeds.insert(1, f"{share['median']:.0%}" if share else NOT_MEASURED)
            ratios = row["ratios"].get(c["name"], {})
            name = f"{c['name']} ({c['version']})" if "version" in c else c["name"]
            cells = [row["scheme"], name, _kernels(c), *speeds]
            lines.append(_line([*cells, *(f"{ratios[r]['median']:.2f}" if r in ratios else _NO_VALUE for r in rates)]))
    return "\n".join(lines)


def _kernels(runner: dict[str, Any]) -> str:
    """Return the instruction set: ours by name, a peer's as the widest that its build says it has."""
    if "kernels" in runner:
        return str(runner["kernels"])
    has = set(re.findall(r"(\w+) = 1\b", runner.get("built_for", "")))
    return next((name for name in _WIDEST_FIRST if name in has), _NO_VALUE)


def _spread(value: Spread | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value['median']:.1f} ({value['low']:.1f}–{value['high']:.1f})"


def _goals(row: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield measure, goal and a judged cell for each of our runners."""
    ours, contexts = _ours(row), sorted(row["contexts"])
    first = row["contexts"][0]

    def ratio(figure: str, least: float) -> dict[str, str]:
        of = {c["name"]: row["ratios"].get(c["name"], {}).get(figure) for c in ours}
        return {name: _judged(r and r["median"], lambda v: v >= least, ".2f") for name, r in of.items()}

    def figure(name: str) -> dict[str, float | None]:
        return {c["name"]: c["figures"].get(name, {}).get("median") for c in ours}

    goal = f"≥ {DECODE_RATIO} × the peer, aim {DECODE_RATIO_AIM}"
    yield "decode", goal, ratio(f"decode_at_{first}_tok_s", DECODE_RATIO)
    shares = figure(f"decode_at_{first}_share")
    goal = f"≥ {DECODE_SHARE:.0%} of the bandwidth bound"
    yield "decode", goal, {name: _judged(v, lambda v: v >= DECODE_SHARE, ".0%") for name, v in shares.items()}
    for n in row["prompt_tokens"]:
        yield f"prefill {n}", f"≥ {PREFILL_RATIO:g} × the peer", ratio(f"prefill_{n}_tok_s", PREFILL_RATIO)
    if len(contexts) > 1:
        steady = figure(f"decode_{contexts[-1]}_over_{contexts[0]}")
        measure, goal = f"decode at {contexts[-1]} / at {contexts[0]}", f"within {CONTEXT_TOLERANCE:.0%}"
        yield measure, goal, {n: _judged(v, lambda v: abs(v - 1) <= CONTEXT_TOLERANCE, ".3f") for n, v in steady.items()}
    startup = row["startup"]
    opened = next(c["name"] for c in ours if c["activations"] == startup["activations"])
    again, first_s = startup["open_seconds"], startup["first_open_seconds"]
    cell = _judged(again, lambda v: v < OPEN_SECONDS, ".2f") + f" (the very first, hashing all: {first_s:.2f})"
    yield "seconds to open", f"< {OPEN_SECONDS:g}", {opened: cell}
    peak, limit = startup["peak_bytes"], startup["limit_bytes"]
    yield "peak memory, GB", f"≤ {limit / 1e9:.2f}", {opened: _judged(peak / 1e9, lambda v: v * 1e9 <= limit, ".2f")}


def _judged(value: float | None, within: Callable[[float], bool], form: str) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:{form}}, {'reached' if within(value) else '**missed**'}"
