"""The result of `bench decode --device cuda` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..terminal.output import cell, figure, megabytes
from .decode_tables import figure_cell, figure_label


def gpu_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield speed by runner, how many times each other's it is, and what was measured beside it."""
    for row in result["rows"]:
        yield _speed(result, row)
        yield _ratios(row)
        yield _beside(result, row)


def _speed(result: dict[str, Any], row: dict[str, Any]) -> Table:
    title = f"{result['model']} on {result['gpu']['name']}, median (low–high) of {row['rounds']} rounds"
    table = Table(title=cell(title), title_justify="left")
    table.add_column("measure")
    for runner in row["runners"]:
        table.add_column(cell(runner["name"]), justify="right")
    for name in dict.fromkeys(f for c in row["runners"] for f in c["figures"]):
        table.add_row(gpu_label(name), *(figure_cell(name, c["figures"].get(name)) for c in row["runners"]))
    return table


def gpu_label(name: str) -> str:
    """Name a figure for a reader; the peak of a GPU is that of its float16 products."""
    return figure_label(name).replace("peak products", "peak float16 products")


def _ratios(row: dict[str, Any]) -> Table:
    table = Table(title="times the speed of another, within a round", title_justify="left")
    for column in ("runner", "of", "measure"):
        table.add_column(column)
    table.add_column("times", justify="right")
    for other, ours in row["ratios"].items():
        for name, figures in ours.items():
            for measure, value in figures.items():
                table.add_row(cell(name), cell(other), gpu_label(measure).removesuffix(", tok/s"), figure_cell("", value))
    return table


def _beside(result: dict[str, Any], row: dict[str, Any]) -> Table:
    table = Table(title=cell(f"{result['gpu']['name']}: limits, memory, first tokens"), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("memory bandwidth, GB/s", figure_cell("", row["limits"]["read_gb_s"]))
    for what, peak in row["limits"]["peak_macs_per_s"].items():
        table.add_row(f"large {what} product, 10⁹ products/s", figure_cell("_macs_per_s", peak))
    for c in row["runners"]:
        name, peak = c["name"], c["peak_bytes"]
        table.add_row(cell(f"{name}: weights a token reads"), megabytes(c["weights_bytes"]))
        table.add_row(cell(f"{name}: peak of the GPU's memory"), "not measured" if peak is None else megabytes(peak))
        for way, distance in c.get("relative_rms_from_numpy", {}).items():
            table.add_row(cell(f"{name}: distance from numpy, tokens {way}"), figure(distance))
        for context in c.get("contexts_without_memory", []):
            table.add_row(cell(f"{name}: at {context}"), "left out, its keys and values do not fit the GPU")
        prefix_reuse = c.get("prefix_reuse")
        if prefix_reuse:
            asked = f"{prefix_reuse['visual_tokens']} + {prefix_reuse['question_tokens']} tokens"
            table.add_row(
                cell(f"{name}: first token from scratch, {asked}, s"), figure_cell("", prefix_reuse["scratch_seconds"])
            )
            table.add_row(
                cell(f"{name}: first token from the image's state, s"), figure_cell("", prefix_reuse["reuse_seconds"])
            )
    return table
