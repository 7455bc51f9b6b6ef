"""The result of `bench decode` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ..terminal.output import cell, figure, megabytes
from .spread import Spread


def figure_label(name: str) -> str:
    """Name a figure of the result for a reader: "decode_at_64_tok_s" is "decode at 64, tok/s"."""
    for ending, unit in (
        ("_tok_s", ", tok/s"),
        ("_macs_per_s", ", 10⁹ products/s"),
        ("_peak_share", ", of the peak products"),
        ("_share", ", of the bandwidth bound"),
    ):
        if name.endswith(ending):
            return name.removesuffix(ending).replace("_", " ") + unit
    return name.replace("_", " ")


def decode_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of each row: runners beside each other, then opening, memory and follow-up questions."""
    for row in result["rows"]:
        yield _speed(result["model"], row)
        yield _beside(row)


def figure_cell(name: str, value: Spread | None) -> str:
    """Write a spread as its median and extremes, shares as percentages, products in 10⁹."""
    if value is None:
        return ""
    low, middle, high = (value[k] for k in ("low", "median", "high"))
    if name.endswith("_share"):
        return f"{middle:.1%} ({low:.1%}–{high:.1%})"
    scale = 1e9 if name.endswith("_macs_per_s") else 1
    return f"{figure(middle / scale)} ({figure(low / scale)}–{figure(high / scale)})"


def _speed(model: str, row: dict[str, Any]) -> Table:
    title = f"{model} as {row['scheme']}, {row['threads']} threads, median (low–high) of {row['rounds']} rounds"
    table = Table(title=cell(title), title_justify="left")
    table.add_column("measure")
    for runner in row["runners"]:
        kernels = runner.get("kernels", "")
        table.add_column(cell(f"{runner['name']}\n{kernels}" if kernels else runner["name"]), justify="right")
    for name in row["ratios"]:
        table.add_column(cell(f"{name}\n/ {row['peer']}"), justify="right")
    for figure_name in dict.fromkeys(f for c in row["runners"] for f in c["figures"]):
        cells = [figure_cell(figure_name, c["figures"].get(figure_name)) for c in row["runners"]]
        cells += [figure_cell("", of.get(figure_name)) for of in row["ratios"].values()]
        table.add_row(figure_label(figure_name), *cells)
    return table


def _beside(row: dict[str, Any]) -> Table:
    limits, startup, prefix_reuse = row["limits"], row["startup"], row["prefix_reuse"]
    table = Table(title=cell(f"{row['scheme']}: limits, opening, follow-up"), title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("read bandwidth, GB/s", figure_cell("", limits["read_gb_s"]))
    for kernels, peak in limits["peak_macs_per_s"].items():
        table.add_row(f"peak int8 products, {kernels}, 10⁹/s", figure_cell("_macs_per_s", peak))
    for form, distance in row["relative_rms_from_numpy"].items():
        table.add_row(f"distance from numpy, {form}", figure(distance))
    table.add_row("first opening, hashing every file, s", figure(startup["first_open_seconds"]))
    table.add_row("opening again, s", figure(startup["open_seconds"]))
    table.add_row("peak resident memory", megabytes(startup["peak_bytes"]))
    table.add_row("its limit", megabytes(startup["limit_bytes"]))
    asked = f"{prefix_reuse['visual_tokens']} + {prefix_reuse['question_tokens']} tokens"
    table.add_row(f"first token from scratch, {asked}, s", figure_cell("", prefix_reuse["scratch_seconds"]))
    table.add_row("first token from the image's state, s", figure_cell("", prefix_reuse["reuse_seconds"]))
    table.add_row("times faster (decoder alone)", figure_cell("", prefix_reuse["speedup"]))
    return table
