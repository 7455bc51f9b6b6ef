"""`python -m bench.fault_injection`: which planted faults the harness catches, with the budget of `python -m bench.budgets`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.output import debug_option, figure, main_of, print_json, progress, results
from cobra_edge.terminal.suggestions import near_matches


@click.command(epilog="Example: python -m bench.fault_injection --only nibbles --only A_log")
@click.option("--only", multiple=True, metavar="NAME", help="Plant this one only; may be given again.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Keep good builds here, and take those that are there.")
@click.option("--name", help="Of the file in bench/results. Default: regress-faults, with --only regress-faults-only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def fault_injection(only: tuple[str, ...], scratch: Path | None, name: str | None, as_json: bool) -> None:
    """Break builds of cobra-mini in many ways, hold each against the budgets, and count which faults are caught.

    A fault that is caught by none is a row like any other: what the harness cannot see is part of the result.
    """
    name = name or ("regress-faults-only" if only else "regress-faults")
    check_name(name)
    require_export("fault_injection")
    from cobra_edge.bench.machine import machine

    from .fault_trials import FAULTS, run_trials

    for label in only:
        if label not in FAULTS:
            raise InputError(f"unknown fault {label!r}{near_matches(label, FAULTS)}")
    wanted = [fault for fault in FAULTS.values() if not only or fault.name in only]
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("faults", total=sum(fault.draws for fault in wanted))
        rows = []
        for row in run_trials(scratch or Path(folder), wanted, lambda what, done, _: bar.update(task, description=what)):
            bar.advance(task, row["draws"])
            rows.append(row)
    result = {"bench": "regress-faults", "model": "cobra-mini", "rows": rows, "machine": machine()}
    file = save_result(name, result)
    if as_json:
        print_json(result)
        return
    results.print(_table(rows))
    results.print(f"kept: {file}", highlight=False)


def require_export(command: str) -> None:
    """Raise MachineError where a library of the extras export and regress is missing."""
    try:
        import onnx  # noqa: F401 - only whether they are there
        import scipy  # noqa: F401
        import tomlkit  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"bench.{command} needs {error.name}; install it with: {install_hint('export', 'regress')}"
        ) from error


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="planted faults", title_justify="left")
    for column in ("fault", "build", "caught", "by the shipped budget", "expected measure", "furthest beyond"):
        table.add_column(column, justify="left" if column in ("fault", "build", "furthest beyond") else "right")
    for row in rows:
        of = row["draws"]
        furthest = row["refused"] or (f"{row['worst']}, {figure(row['worst_times'])} times its limit" if row["worst"] else "")
        shares = (f"{row[part]} of {of}" for part in ("caught", "caught_by_shipped", "expected_failed"))
        table.add_row(row["name"], row["build"], *shares, furthest)
    return table


main = main_of(fault_injection)

if __name__ == "__main__":
    main()
