"""`bench faults`: which planted faults the harness catches; `bench budgets`: the budget it catches them with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..errors import InputError, MachineError, near_matches
from ..requirements import install_hint
from ..tables import figure
from ..terminal import debug_option, print_json, progress, results, say
from .results import check_name, keep


@click.command(epilog="Example: python -m cobra_edge.bench faults --only nibbles --only A_log")
@click.option("--only", multiple=True, metavar="NAME", help="Plant this one only; may be given again.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Keep good builds here, and take those that are there.")
@click.option("--name", help="Of the file in bench/results. Default: regress-faults, with --only regress-faults-only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def faults(only: tuple[str, ...], scratch: Path | None, name: str | None, as_json: bool) -> None:
    """Break builds of cobra-mini in many ways, hold each against the budgets, and count which faults are caught.

    A fault that is caught by none is a row like any other: what the harness cannot see is part of the result.
    """
    name = name or ("regress-faults-only" if only else "regress-faults")
    check_name(name)
    _require_export("faults")
    from .faults import FAULTS, try_all
    from .machine import machine

    for label in only:
        if label not in FAULTS:
            raise InputError(f"unknown fault {label!r}{near_matches(label, FAULTS)}")
    wanted = [fault for fault in FAULTS.values() if not only or fault.name in only]
    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("faults", total=sum(fault.draws for fault in wanted))
        rows = []
        for row in try_all(scratch or Path(folder), wanted, lambda what, done, _: bar.update(task, description=what)):
            bar.advance(task, row["draws"])
            rows.append(row)
    result = {"bench": "regress-faults", "model": "cobra-mini", "rows": rows, "machine": machine()}
    file = keep(name, result)
    if as_json:
        print_json(result)
        return
    results.print(_table(rows))
    results.print(f"kept: {file}", highlight=False)


@click.command(epilog="Example: python -m cobra_edge.bench budgets && git diff export/budgets")
@debug_option
def budgets() -> None:
    """Export every gated build of cobra-mini, measure it, and write the limits anew, for review."""
    _require_export("budgets")
    from .budgets import BUDGET, write_budget

    with tempfile.TemporaryDirectory() as folder, progress() as bar:
        task = bar.add_task("builds", total=None)
        write_budget(
            BUDGET, Path(folder), lambda scheme, done, total: bar.update(task, description=scheme, completed=done, total=total)
        )
    say(f"{BUDGET}: written; read what changed before you commit it")


def _require_export(verb: str) -> None:
    try:
        import onnx  # noqa: F401 - only whether they are there
        import scipy  # noqa: F401
        import tomlkit  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"bench {verb} needs {error.name}; install it with: {install_hint('export', 'regress')}") from error


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
