"""Speed on a GPU: the tables of docs/results/gpu.md, and the goals of w4a16-g128."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cobra_edge.bench.decode_result import GpuDecodeResult, GpuDecodeRow, RunnerResult
from cobra_edge.bench.end_to_end import PUBLISHED_TOK_S, EndToEndResult
from cobra_edge.bench.spread import Spread
from cobra_edge.bench.tables import NO_VALUE, NOT_MEASURED, Table, judged

_CONTEXT_TOLERANCE = 0.03
OURS, MAMBA_SSM, BITSANDBYTES = "cobra_edge w4a16-g128", "mamba-ssm fp16", "bitsandbytes nf4"
_FLOAT = "cobra_edge fp16"
_GOAL_GPU = "H200"  # an absolute rate is a goal on this GPU only


@dataclass(frozen=True)
class Goal:
    """One goal: measure, text of the goal, how to find and judge the value, its format, and the GPU it applies to."""

    measure: str
    goal: str
    find: Callable[[GpuDecodeRow], float | None]
    within: Callable[[float], bool]
    form: str = ".2f"
    only_on: str = ""


def _figure(row: GpuDecodeRow, runner: str, name: str) -> float | None:
    figures: dict[str, Spread] = next((r.figures for r in row.runners if r.name == runner), {})
    return figures[name].median if name in figures else None


def _ratio(row: GpuDecodeRow, other: str, name: str) -> float | None:
    figures = row.ratios.get(other, {}).get(OURS, {})
    return figures[name].median if name in figures else None


def _decode(row: GpuDecodeRow) -> str:
    return f"decode_at_{row.contexts[0]}_tok_s"


def _steadiness(row: GpuDecodeRow) -> float | None:
    return _figure(row, OURS, f"decode_{max(row.contexts)}_over_{min(row.contexts)}")


GOALS = (
    Goal(
        "decode, tok/s",
        f"≥ 1200 on an {_GOAL_GPU}",
        lambda row: _figure(row, OURS, _decode(row)),
        lambda v: v >= 1200,
        ".0f",
        _GOAL_GPU,
    ),
    Goal("decode", "≥ 3 × mamba-ssm fp16", lambda row: _ratio(row, MAMBA_SSM, _decode(row)), lambda v: v >= 3),
    Goal("decode", "≥ 4 × bitsandbytes nf4", lambda row: _ratio(row, BITSANDBYTES, _decode(row)), lambda v: v >= 4),
    Goal("prefill 768", "not slower than fp16", lambda row: _ratio(row, _FLOAT, "prefill_768_tok_s"), lambda v: v >= 1),
    Goal(
        "decode, longest context / shortest",
        f"within {_CONTEXT_TOLERANCE:.0%}",
        _steadiness,
        lambda v: abs(v - 1) <= _CONTEXT_TOLERANCE,
        ".3f",
    ),
)


def gpu_goals_table(results: Sequence[GpuDecodeResult]) -> Table:
    """Return the goals of w4a16-g128 and the measurements, with a column for each GPU: the first result that has a figure."""
    rows_of: dict[str, list[GpuDecodeRow]] = {}
    for result in results:
        rows_of.setdefault(result.gpu.name, []).extend(result.rows)
    rows = [[g.measure, g.goal, *([_cell(g, *of) for of in rows_of.items()] or [NOT_MEASURED])] for g in GOALS]
    return Table(["w4a16-g128", "goal", *(list(rows_of) or ["measured"])], rows)


def _cell(goal: Goal, gpu: str, rows: Sequence[GpuDecodeRow]) -> str:
    value = next((v for row in rows if (v := goal.find(row)) is not None), None)
    if value is not None and goal.only_on not in gpu:
        return f"{value:{goal.form}}, no goal for this GPU"
    return judged(value, value is not None and goal.within(value), goal.form)


def gpu_table(result: GpuDecodeResult) -> Table:
    """Return speed and memory by runner."""
    (row,), gpu = result.rows, result.gpu
    contexts, prompts, limits = row.contexts, row.prompt_tokens, row.limits
    peak = limits.peak_macs_per_s.get("float16")
    matmul = "" if peak is None else f", a large float16 matmul {2 * peak.median / 1e12:.0f} TFLOP/s"
    title = f"{result.model}, {result.weights} weights, on {gpu.name}: batch 1, {row.rounds} alternating rounds, median "
    title += f"(low–high); memory bandwidth in the same run {limits.read_gb_s.median:.0f} GB/s{matmul}; "
    title += f"driver for {gpu.driver}, torch {gpu.torch}; commit {result.machine.commit}."
    first = contexts[0]
    columns = ["decoder", "weights read per token, GB", "peak memory, GB", f"decode at {first}, tok/s"]
    columns += ["share of the bandwidth bound", *(f"at {context}, tok/s" for context in contexts[1:])]
    columns += [*(f"prefill {n}, tok/s" for n in prompts), f"prefill {prompts[-1]}, share of the large matmul"]
    columns += ["time to first token from scratch, ms", "from the image's state, ms", f"speedup of {OURS.split()[-1]}, decode"]
    notes = [] if len(contexts) == 1 else ["Peers with a state of fixed size are decoded at the first context only."]
    return Table(columns, [_cells(row, runner) for runner in row.runners], title, notes)


def _cells(row: GpuDecodeRow, runner: RunnerResult) -> list[str]:
    first, figures, reuse = row.contexts[0], runner.figures, runner.prefix_reuse
    name = f"{runner.name} ({runner.version})" if runner.version else runner.name
    memory = NOT_MEASURED if runner.peak_bytes is None else f"{runner.peak_bytes / 1e9:.2f}"
    cells = [name, f"{runner.weights_bytes / 1e9:.2f}", memory]
    cells += [_spread(figures.get(f"decode_at_{first}_tok_s"), ".1f"), _share(figures.get(f"decode_at_{first}_share"))]
    for context in row.contexts[1:]:
        known = _spread(figures.get(f"decode_at_{context}_tok_s"), ".1f")
        cells.append("does not fit" if context in runner.contexts_without_memory else known)
    cells += [_spread(figures.get(f"prefill_{n}_tok_s"), ".0f") for n in row.prompt_tokens]
    cells.append(_share(figures.get(f"prefill_{row.prompt_tokens[-1]}_peak_share")))
    for seconds in (reuse.scratch_seconds, reuse.reuse_seconds) if reuse else (None, None):
        cells.append(_spread(seconds and seconds.scaled(1e3), ".1f"))
    ratio = _ratio(row, runner.name, f"decode_at_{first}_tok_s")
    return [*cells, NO_VALUE if ratio is None else f"{ratio:.2f}"]


def end_to_end_table(results: Sequence[EndToEndResult]) -> Table:
    """Return complete answers about an image, encoding included, after the published figure."""
    published = ["Cobra-3.5B, its authors' code", "A100 80GB", f"{PUBLISHED_TOK_S}", NO_VALUE, NO_VALUE]
    rows = [[*published, "published, not measured here"]]
    for result in results:
        figures = result.figures
        cells = [f"{result.model} {result.scheme}", result.machine_name, figures.tok_s.cell(".1f")]
        cells += [seconds.scaled(1e3).cell(".1f") for seconds in (figures.encode_seconds, figures.first_token_seconds)]
        what = f"{result.weights} weights, {result.visual_tokens} + {result.prompt_tokens} prompt tokens, "
        rows.append([*cells, f"{what}{result.new_tokens} new tokens, median of {result.rounds}"])
    if not results:
        rows.append(["w4a16-g128", "a GPU", *[NOT_MEASURED] * 3, ""])
    return Table(["build", "device", "tok/s", "image encoding, ms", "time to first token, ms", ""], rows)


def _spread(value: Spread | None, form: str) -> str:
    return NO_VALUE if value is None else value.cell(form)


def _share(value: Spread | None) -> str:
    return NO_VALUE if value is None else f"{value.median:.0%}"
