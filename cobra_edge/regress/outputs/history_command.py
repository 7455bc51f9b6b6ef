"""`regress history`: drift over commits, as a table and a plot."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ...terminal.option_groups import Command, option
from ...terminal.output import cell, debug_option, print_json, results, say
from ..measures import format_value, measure_named
from ..report import Figure
from .difference import shortened
from .history import Entry, read_history
from .rows import format_interval


@click.command(cls=Command, epilog="Example: cobra-edge regress history drift.jsonl --measure kld_mean --out drift.svg")
@click.argument("file", type=click.Path(path_type=Path))
@option("--measure", group="input", default="kld_mean", help="Measure to show, as named in report.json.")
@option("--out", group="output", type=click.Path(path_type=Path, dir_okay=False), help="Plot to write: .svg, .png or .pdf.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def history(file: Path, out: Path | None, measure: str, as_json: bool) -> None:
    """Show one measure over all runs in FILE, the JSON lines that `regress --history` appends to, and plot it."""
    measure_named(measure)
    if out is not None:
        from .history_plot import check_plot

        check_plot(out, measure)
    entries = read_history(file)
    if out is not None:
        from .history_plot import plot_history

        plot_history(entries, out, measure)
    if as_json:
        print_json({"measure": measure, "entries": entries})
        return
    results.print(_table(entries, measure))
    if out is not None:
        say(f"plot: {out}")


def _table(entries: list[Entry], measure: str) -> Table:
    table = Table(title=cell(f"{measure_named(measure).label}, {len(entries)} runs"), title_justify="left")
    for column in ("time", "commit", "build", "scheme", "decoder"):
        table.add_column(column, overflow="fold")
    for column in ("value", "95 % interval", ""):
        table.add_column(column, justify="right", overflow="fold")
    for entry in entries:
        figure = entry.measures.get(measure, Figure(None))
        about = (entry.time[:19], (entry.commit or "")[:12], entry.build, entry.scheme, entry.decoder)
        verdict = {None: "no limit", True: "held", False: "FAILED"}[entry.passed]
        cells = (*about, format_value(measure, figure.value), format_interval(measure, figure), verdict)
        table.add_row(*(cell(shortened(text, 60)) for text in cells), style="red" if entry.passed is False else None)
    return table
