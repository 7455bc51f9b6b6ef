"""`python -m bench.interval_coverage`: how often the harness's 95 % intervals hold the truth."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.progress import TaskID
from rich.table import Table

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.terminal.output import debug_option, figure, main_of, print_json, progress, results


@click.command(epilog="Example: python -m bench.interval_coverage --replicates 4000")
@click.option("--replicates", type=click.IntRange(1), default=2000, show_default=True, help="Drawn suites of each size.")
@click.option("--name", default="interval-coverage", show_default=True, help="Of the file in bench/results.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def interval_coverage(replicates: int, name: str, as_json: bool) -> None:
    """Draw suites from cobra-mini's held-out one; count how often each measure's interval holds the whole one's value."""
    check_name(name)
    try:
        import scipy  # noqa: F401 - only whether it is there
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"bench.interval_coverage needs {error.name}; install it with: {install_hint('export', 'regress')}"
        ) from error
    from cobra_edge.bench.machine import machine

    from .interval_coverage_run import measure

    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        tasks: dict[str, TaskID] = {}

        def on_step(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        rows = measure(Path(folder), replicates, on_step)
    result = {"bench": "coverage", "model": "cobra-mini", "replicates": replicates, "rows": rows, "machine": machine()}
    file = save_result(name, result)
    if as_json:
        print_json(result)
        return
    results.print(coverage_terminal_table(rows, replicates))
    results.print(f"kept: {file}", highlight=False)


def coverage_terminal_table(rows: list[dict[str, Any]], replicates: int) -> Table:
    """Return the rows for a terminal."""
    table = Table(title=f"95 % intervals, {replicates} drawn suites each", title_justify="left")
    for column in ("build", "measure", "method", "images", "value", "holds it", "too low", "too high"):
        table.add_column(column, justify="left" if column in ("build", "measure", "method") else "right")
    for row in rows:
        shares = (f"{row[part]:.1%}" for part in ("coverage", "below", "above"))
        table.add_row(row["build"], row["measure"], row["method"], str(row["images"]), figure(row["value"]), *shares)
    return table


main = main_of(interval_coverage)

if __name__ == "__main__":
    main()
