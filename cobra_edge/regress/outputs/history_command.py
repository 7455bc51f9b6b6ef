"""`regress history`: drift over commits, as a table and a plot."""

from __future__ import annotations

from pathlib import Path

import click

from ...terminal.listing import Listing, Row
from ...terminal.option_groups import Command, option
from ...terminal.output import debug_option, print_json, results, say
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


def _table(entries: list[Entry], measure: str) -> Listing:
    """Return a row for each run; what all runs have in common is said once, in the title."""
    about = {
        "commit": [(entry.commit or "")[:12] for entry in entries],
        "build": [entry.build for entry in entries],
        "scheme": [entry.scheme for entry in entries],
        "decoder": [entry.decoder for entry in entries],
    }
    common = {name: of[0] for name, of in about.items() if len(set(of)) == 1 and of[0]}
    own = [name for name, of in about.items() if len(set(of)) > 1]
    rows = []
    for i, entry in enumerate(entries):
        figure = entry.measures.get(measure, Figure(None))
        verdict = {None: "no limit", True: "held", False: "FAILED"}[entry.passed]
        value, ends = format_value(measure, figure.value), format_interval(measure, figure)
        cells = (entry.time[:19], value, verdict, ends, *(shortened(about[name][i], 60) for name in own))
        rows.append(Row(cells, "red" if entry.passed is False else ""))
    of = "; ".join(f"{name} {text}" for name, text in common.items())
    title = f"{measure}: {measure_named(measure).title}, {len(entries)} runs" + (f"; {shortened(of, 200)}" if of else "")
    return Listing(title, ("time", "value", "verdict", "95 % interval", *own), rows, numbers=(1,))
