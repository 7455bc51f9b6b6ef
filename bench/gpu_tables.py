"""Tables of speed on a GPU (docs/results/gpu.md), from `bench decode --device cuda` and `bench end-to-end`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cobra_edge.bench.spread import Spread

from .decode_tables import NOT_MEASURED

_NO_VALUE = "–"
_CONTEXT_TOLERANCE = 0.03
OURS, MAMBA_SSM, BITSANDBYTES = "cobra_edge w4a16-g128", "mamba-ssm fp16", "bitsandbytes nf4"
_FLOAT = "cobra_edge fp16"
_GOAL_GPU = "H200"  # a rate means something on one GPU only; ratios on any

Result = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """One line: what is measured, what it should be, how it is found in a row, and on which GPUs it is judged."""

    measure: str
    goal: str
    find: Callable[[dict[str, Any]], float | None]
    within: Callable[[float], bool]
    form: str = ".2f"
    only_on: str = ""


def _figure(row: dict[str, Any], runner: str, name: str) -> float | None:
    figures: dict[str, Spread] = next((c["figures"] for c in row["runners"] if c["name"] == runner), {})
    return figures[name]["median"] if name in figures else None


def _ratio(row: dict[str, Any], other: str, name: str) -> float | None:
    figures: dict[str, Spread] = row["ratios"].get(other, {}).get(OURS, {})
    return figures[name]["median"] if name in figures else None


def _decode(row: dict[str, Any]) -> str:
    return f"decode_at_{row['contexts'][0]}_tok_s"


def _steadiness(row: dict[str, Any]) -> float | None:
    return _figure(row, OURS, f"decode_{max(row['contexts'])}_over_{min(row['contexts'])}")


GOALS = (
    Goal(
        "decode, tok/s",
        f"≥ 1000 on an {_GOAL_GPU}",
        lambda row: _figure(row, OURS, _decode(row)),
        lambda v: v >= 1000,
        ".0f",
        _GOAL_GPU,
    ),
    Goal("decode", "≥ 2 × mamba-ssm fp16", lambda row: _ratio(row, MAMBA_SSM, _decode(row)), lambda v: v >= 2),
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


def gpu_goals_table(found: Sequence[Result]) -> str:
    """Return the goals of w4a16-g128 on a GPU beside what was measured, a column for each GPU; without one all the same."""
    names = [result["gpu"]["name"] for result in found] or ["measured"]
    lines = [_line(["w4a16-g128", "goal", *names]), "|---" * (len(names) + 2) + "|"]
    for goal in GOALS:
        cells = [_judged(goal, result) for result in found] or [NOT_MEASURED]
        lines.append(_line([goal.measure, goal.goal, *cells]))
    return "\n".join(lines)


def _judged(goal: Goal, result: Result) -> str:
    value = goal.find(result["rows"][0])
    if value is None:
        return NOT_MEASURED
    if goal.only_on not in result["gpu"]["name"]:
        return f"{value:{goal.form}}, no goal for this GPU"
    return f"{value:{goal.form}}, {'reached' if goal.within(value) else '**missed**'}"


def gpu_table(found: Sequence[Result]) -> str:
    """Return speed and memory by runner as Markdown, a table for each GPU, each below a line about it."""
    return "\n\n".join(_speed(result) for result in found) if found else NOT_MEASURED


def _speed(result: Result) -> str:
    (row,), gpu, m = result["rows"], result["gpu"], result["machine"]
    contexts, prompts, limits = row["contexts"], row["prompt_tokens"], row["limits"]
    peak = limits["peak_macs_per_s"]["float16"]["median"]
    head = (
        f"{result['model']}, {result['weights']} weights, on {gpu['name']}: batch 1, {row['rounds']} rounds in turns, median "
    )
    head += f"(low–high); its memory gave {limits['read_gb_s']['median']:.0f} GB/s in the same run, a large float16 product "
    head += f"{2 * peak / 1e12:.0f} TFLOP/s; torch {gpu['torch']}; commit {m['commit']}."
    first, last = contexts[0], contexts[-1]
    columns = ["decoder", "weights a token reads, GB", "peak memory, GB", f"decode at {first}, tok/s", "of the bandwidth bound"]
    columns += [f"at {context}, tok/s" for context in contexts[1:]]
    columns += [f"prefill {n}, tok/s" for n in prompts] + [f"prefill {prompts[-1]}, of the large product"]
    columns += ["first token, from scratch, ms", "from the image's state, ms", f"{OURS.split()[-1]} decodes times as fast"]
    lines = [head, "", _line(columns), "|---" * len(columns) + "|"]
    for c in row["runners"]:
        figures, prefix_reuse = c["figures"], c.get("prefix_reuse") or {}
        left_out = c.get("contexts_without_memory", ())
        name = f"{c['name']} ({c['version']})" if "version" in c else c["name"]
        cells = [name, f"{c['weights_bytes'] / 1e9:.2f}", _gigabytes(c["peak_bytes"])]
        cells += [_cell(figures.get(f"decode_at_{first}_tok_s"), ".1f"), _share(figures.get(f"decode_at_{first}_share"))]
        for context in contexts[1:]:
            known = _cell(figures.get(f"decode_at_{context}_tok_s"), ".1f")
            cells.append("does not fit" if context in left_out else known)
        cells += [_cell(figures.get(f"prefill_{n}_tok_s"), ".0f") for n in prompts]
        cells.append(_share(figures.get(f"prefill_{prompts[-1]}_peak_share")))
        cells += [_cell(_in_ms(prefix_reuse.get(way)), ".1f") for way in ("scratch_seconds", "reuse_seconds")]
        ratio = _ratio(row, c["name"], f"decode_at_{first}_tok_s")
        lines.append(_line([*cells, _NO_VALUE if ratio is None else f"{ratio:.2f}"]))
    if last != first:
        lines += ["", "Peers and bitsandbytes' codes whose state has one size are decoded at the first context only."]
    return "\n".join(lines)


def end_to_end_table(found: Sequence[Result]) -> str:
    """Return answers about an image, encoding included, below the published figure; it stands there without any."""
    columns = ["build", "on", "tok/s", "encoding the image, ms", "first token, ms", ""]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    lines.append(
        _line(["Cobra-3.5B, its authors' code", "A100 80GB", "166.5", _NO_VALUE, _NO_VALUE, "published, not measured here"])
    )
    for result in found:
        figures = result["figures"]
        cells = [f"{result['model']} {result['scheme']}", result["machine_name"], _cell(figures["tok_s"], ".1f")]
        cells += [_cell(_in_ms(figures[f"{what}_seconds"]), ".1f") for what in ("encode", "first_token")]
        what = f"{result['weights']} weights, {result['visual_tokens']} + {result['prompt_tokens']} tokens read, "
        lines.append(_line([*cells, what + f"{result['new_tokens']} written, median of {result['rounds']}"]))
    if not found:
        lines.append(_line(["w4a16-g128", "a GPU", *[NOT_MEASURED] * 3, ""]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Spread | None, form: str) -> str:
    return _NO_VALUE if value is None else f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def _share(value: Spread | None) -> str:
    return _NO_VALUE if value is None else f"{value['median']:.0%}"


def _in_ms(value: Spread | None) -> Spread | None:
    return None if value is None else {end: seconds * 1e3 for end, seconds in value.items()}


def _gigabytes(size_bytes: int | None) -> str:
    return NOT_MEASURED if size_bytes is None else f"{size_bytes / 1e9:.2f}"
