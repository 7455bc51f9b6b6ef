"""`python -m bench.fault_injection`: which injected faults the regression harness catches."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress
from cobra_edge.terminal.suggestions import near_matches

from .fault_result import FaultResult, faults_table


@click.command(
    name="fault-injection", cls=Command, epilog="Example: python -m bench.fault_injection --only nibbles --only A_log"
)
@option("--only", group="measurement", multiple=True, metavar="NAME", help="Inject only this fault; repeatable.")
@option(
    "--name",
    group="output",
    help="Name of the file in bench/results.  [default: regress-faults; regress-faults-only with --only]",
)
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@option("--scratch", group="advanced", type=click.Path(path_type=Path), help="Directory to keep good builds in, and to reuse.")
@debug_option
def fault_injection(only: tuple[str, ...], scratch: Path | None, name: str | None, as_json: bool) -> None:
    """Break builds of cobra-mini in many ways, and count which faults exceed a budget.

    Faults that are not caught are reported like all others.
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
            bar.advance(task, row.draws)
            rows.append(row)
    result = FaultResult(model="cobra-mini", rows=tuple(rows), machine=machine())
    file = save_result(name, result)
    if as_json:
        print_json(result)
    else:
        print_result([faults_table(result)], file)


def require_export(command: str) -> None:
    """Raise MachineError if a library of the extras export and regress is missing."""
    try:
        import onnx  # noqa: F401 - only whether they are installed
        import tomlkit  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        hint = install_hint("export", "regress")
        raise MachineError(f"bench.{command} needs {error.name}; install it with: {hint}") from error


main = main_of(fault_injection)

if __name__ == "__main__":
    main()
