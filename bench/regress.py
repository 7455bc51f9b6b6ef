"""`python -m bench.regress`: what a run of the regression harness takes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.table import Table

from cobra_edge.bench.results import save_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.terminal.output import debug_option, main_of, print_json, results, stages


@click.command(epilog="Example: python -m bench.regress")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def regress(as_json: bool) -> None:
    """Run the regression harness on cobra-mini: seconds and peak memory, by baseline and by the suite's length."""
    try:
        import scipy  # noqa: F401 - only whether it is there
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"bench.regress needs {error.name}; install it with: {install_hint('export', 'regress')}") from error
    from cobra_edge.bench.machine import machine

    from .suite_cost import suite_costs

    with tempfile.TemporaryDirectory() as folder, stages() as on_step:
        found = suite_costs(Path(folder), on_step)
    result = {"bench": "regress", "model": "cobra-mini", **found, "machine": machine()}
    file = save_result("regress-cobra-mini", result)
    if as_json:
        print_json(result)
        return
    table = Table(title="a run of the regression harness on cobra-mini", title_justify="left")
    for column in ("scheme", "baseline", "lines", "seconds", "peak, MiB"):
        table.add_column(column, justify="left" if column in ("scheme", "baseline") else "right")
    for row in found["rows"]:
        cells = (f"{row['seconds']['median']:,.1f}", f"{row['peak_mib']['median']:,.0f}")
        table.add_row(row["scheme"], row["baseline"], str(row["lines"]), *cells)
    for row in found["lengths"]:
        cells = (f"{row['seconds']['median']:,.1f}", f"{row['peak_mib']['median']:,.0f}")
        table.add_row("by length", "fp16 bundle", str(row["lines"]), *cells)
    results.print(table)
    results.print(f"kept: {file}", highlight=False)


main = main_of(regress)

if __name__ == "__main__":
    main()
