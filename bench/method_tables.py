"""The tables of `python -m bench.methods` as cells, for the terminal and for docs/results/full-size.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from cobra_edge.bench.spread import Spread

# What calibrate and quantize were asked to stay within, at full size on a CPU.
MINUTES, GIB = 90, 16
NOT_MEASURED = "not measured"
_NO_VALUE = "–"

Result = dict[str, Any]


class Cells(NamedTuple):
    """A table: a line about it, its columns, its rows."""

    head: str
    columns: list[str]
    rows: list[list[str]]


def tables(result: Result) -> Iterator[Cells]:
    """Yield weights, then activations, then time and memory."""
    yield _weights(result)
    yield _activations(result)
    yield _effort(result)


def methods_table(result: Result | None) -> str:
    """Return all of it as Markdown."""
    if result is None:
        return NOT_MEASURED
    return "\n\n".join(_markdown(cells) for cells in tables(result))


def _markdown(cells: Cells) -> str:
    lines = [cells.head, "", _line(cells.columns), "|---" * len(cells.columns) + "|", *(_line(row) for row in cells.rows)]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _weights(result: Result) -> Cells:
    inputs = result["inputs"]

    def heard(site: str, figure: str) -> str:
        return f"{sum(each[site][figure] for each in inputs) / len(inputs):.0f}"

    head = f"Relative output error of {result['scheme']}, {result['layers']} layers of {result['model']}, random weights, "
    head += (
        f"{result['held_out_positions']} held-out positions. {result['outliers']:.0%} of the channels planted 20 to 60 times "
    )
    head += f"louder; the outlier_ratio is {heard('in_proj', 'outlier_ratio')} times the median channel at in_proj and "
    head += f"{heard('out_proj', 'outlier_ratio')} at out_proj, {heard('in_proj', 'outlier_ratio_rotated')} and "
    head += f"{heard('out_proj', 'outlier_ratio_rotated')} behind the rotation."
    rows = [[r["method"], *(_share(error) for error in r["errors"].values())] for r in result["rows"]]
    return Cells(head, ["method", "in_proj", "x_proj", "out_proj", "whole layer"], rows)


def _activations(result: Result) -> Cells:
    head = "int8 activations in the same layers: error with float weights, the same beside what the channels without planted "
    head += f"outliers give alone, and error with {result['scheme']} by gptq."
    columns = ["int8 activations", "clipped"]
    columns += [
        f"{site}: {what}" for site in ("in_proj", "out_proj") for what in ("float weights", "of the quiet", "4-bit weights")
    ]
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["activations"]:
        clipped = "no" if row["clipped_at"] is None else f"{row['clipped_at']:g} %"
        cells = found.setdefault((row["form"], clipped), [])
        cells += [_share(row[figure]) for figure in ("activations", "inlier", "with_codes")]
    return Cells(head, columns, [[*key, *cells] for key, cells in found.items()])


def _effort(result: Result) -> Cells:
    m, parts = result["machine"], result["calibration"]
    streaming, finishing = (parts[f"{part}_seconds_per_layer"]["median"] for part in ("streaming", "finishing"))
    head = f"Time, on {m['processor']}, {result['threads']} threads, load average {result.get('load_average', NOT_MEASURED)}. "
    head += f"Statistics of a layer took {streaming + finishing:.0f} s for "
    head += f"{result['positions']} positions. Minutes are **extrapolated from {result['layers']} of {result['of_layers']} "
    head += f"layers**, for {result['extrapolated_positions']} positions, embedding and head counted by their rows, images not "
    head += f"counted; the goal is {MINUTES}. Peak resident memory of the measuring command was {result['peak_gib']:.1f} GiB, "
    head += f"{_judged(result['peak_gib'], GIB)} (goal {GIB}); commit {m['commit']}."
    columns = ["method", "quantize a layer, s", "calibrate, min", "quantize, min", "both, min", ""]
    rows = []
    for r in result["rows"]:
        minutes = r["total_minutes"]
        calibrate = f"{minutes['calibrate']:.0f}" if minutes["calibrate"] else _NO_VALUE
        cells = [f"{r['seconds_per_layer']['median']:.1f}", calibrate, f"{minutes['quantize']:.1f}", f"{minutes['both']:.1f}"]
        rows.append([r["method"], *cells, _judged(minutes["both"], MINUTES)])
    return Cells(head, columns, rows)


def _share(value: Spread) -> str:
    return f"{value['median']:.2%}"


def _judged(value: float, limit: float) -> str:
    return "reached" if value <= limit else "**missed**"
