"""`python -m bench.regress`: the cost of a run of the regression harness."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from msgspec import structs

from cobra_edge.bench.results import save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, stages

from .suite_cost_result import SuiteCostResult, suite_cost_table


@click.command(cls=Command, epilog="Example: python -m bench.regress")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def regress(as_json: bool) -> None:
    """Measure wall time and peak memory of the regression harness on cobra-mini, by baseline and length of the suite."""
    try:
        import torch  # noqa: F401 - only whether it is installed
    except ImportError as error:
        raise MachineError(f"bench.regress needs {error.name}; install it with: {install_hint('export')}") from error
    from cobra_edge.bench.machine import machine

    from .suite_cost import suite_costs

    with tempfile.TemporaryDirectory() as folder, stages() as on_step:
        found = suite_costs(Path(folder), on_step)
    result = SuiteCostResult(**structs.asdict(found), model="cobra-mini", machine=machine())
    file = save_result("regress-cobra-mini", result)
    if as_json:
        print_json(result)
    else:
        print_result([suite_cost_table(result)], file)


main = main_of(regress)

if __name__ == "__main__":
    main()
