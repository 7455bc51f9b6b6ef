"""`regress history`: drift over commits, as a table and a drawing."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ...terminal.output import cell, debug_option, print_json, results, say
from ..measures import format_value, measure_named
from ..report import Figure
from .difference import shortened
from .history import Entry, read_history
from .rows import format_interval


@click.command(epilog="Example: python -m cobra_edge.regress history drift.jsonl --out drift.svg --measure top1_agreement")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: a file that ends in .svg, .png or .pdf.")
@click.option("--measure", default="kld_mean", show_default=True, help="Which measure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def history(file: Path, out: Path | None, measure: str, as_json: bool) -> None:
    """Show a measure over the runs that FILE has, and draw it."""
    measure_named(measure)
    if out is not None:
        from .history_plot import check_drawing

        check_drawing(out, measure)
    entries = read_history(file)
    if out is not None:
        from .history_plot import draw_history

        draw_history(entries, out, measure)
    if as_json:
        print_json({"measure": measure, "entries": entries})
        return
    results.print(_table(entries, measure))
    if out is not None:
        say(f"drawn: {out}")


def _table(entries: list[Entry], measure: str) -> Table:
    table = Table(title=cell(f"{measure_named(measure).label}, {len(entries)} runs"), title_justify="left")
    for column in ("time", "commit", "build", "scheme", "decoder"):
        table.add_column(column, overflow="fold")
    for column in ("value", "95 % interval", ""):
        table.add_column(column, justify="right", overflow="fold")
    for entry in entries:
        figure = entry.measures.get(measure, Figure(None))
        about = (entry.time[:19], (entry.commit or "")[:12], entry.build, entry.scheme, entry.decoder)
        word = {None: "not judged", True: "held", False: "FAILED"}[entry.passed]
        cells = (*about, format_value(measure, figure.value), format_interval(measure, figure), word)
        table.add_row(*(cell(shortened(text, 60)) for text in cells), style="red" if entry.passed is False else None)
    return table
