"""`python -m bench.quality`: drift and accuracy of every build of cobra-mini, and of peers on the same weights."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.output import debug_option, main_of, print_json, results
from cobra_edge.terminal.suggestions import near_matches


@click.command(epilog="Example: python -m bench.quality --peer-python peers/bin/python")
@click.option("--peer-python", default=sys.executable, help="An interpreter that has llama-cpp-python. Default: this one.")
@click.option("--only", multiple=True, metavar="LABEL", help="Measure this one only; may be given again.")
@click.option("--name", help="Of the file in bench/results. Default: quality, with --only quality-only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def quality(peer_python: str, only: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """Run the held-out suite of cobra-mini through each build and each peer: drift from float, accuracy a task.

    A peer whose library is missing is not measured, and the row says why. One that disagrees before it quantizes ends the run.
    """
    name = name or ("quality-only" if only else "quality")
    check_name(name)
    try:
        import scipy  # noqa: F401 - only whether it is there
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"bench.quality needs {error.name}; install it with: {install_hint('export', 'regress')}") from error
    from cobra_edge.bench.machine import machine

    from .quality_comparison import known_labels, measure

    for label in only:
        if label not in known_labels():
            raise InputError(f"unknown build {label!r}{near_matches(label, known_labels())}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), peer_python, only)
    result = {"bench": "quality", "model": "cobra-mini", **found, "machine": machine()}
    file = save_result(name, result)
    if as_json:
        print_json(result)
        return
    results.print(quality_terminal_table(found["rows"]))
    results.print(f"kept: {file}", highlight=False)


def quality_terminal_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows for a terminal; a row that was not measured says why."""
    tasks = list(rows[0]["accuracy"])
    table = Table(title=f"cobra-mini on {rows[0]['lines']} held-out lines", title_justify="left")
    for column in ("build", "bits", "mean KLD", "95 %", "top-1", *tasks):
        table.add_column(column, justify="left" if column == "build" else "right")
    for row in rows:
        if "not_measured" in row:
            table.add_row(row["label"], f"not measured: {row['not_measured']}")
            continue
        kld = row["kld_mean"]
        cells = [row["label"], f"{row['bits_matrices']:.2f}", f"{kld['value']:.2e}", f"{kld['low']:.1e}–{kld['high']:.1e}"]
        cells.append(f"{row['top1_agreement']['value']:.2%}")
        table.add_row(*cells, *(f"{row['accuracy'][task]['right']:.1%}" for task in tasks))
    return table


main = main_of(quality)

if __name__ == "__main__":
    main()
