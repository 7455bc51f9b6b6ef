"""`python -m bench.interval_coverage`: how often the 95 % intervals of the regression harness contain the true value."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, stages

from .interval_coverage_result import CoverageResult, coverage_table, needed_table, tails_table


@click.command(name="interval-coverage", cls=Command, epilog="Example: python -m bench.interval_coverage --replicates 4000")
@option("--replicates", group="measurement", type=click.IntRange(1), default=2000, help="Drawn suites of each size.")
@option("--name", group="output", default="interval-coverage", help="Name of the file in bench/results.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def interval_coverage(replicates: int, name: str, as_json: bool) -> None:
    """Draw suites from known ones, and count how often each interval contains the value of the whole suite.

    The known ones are cobra-mini's held-out suite, answered by several builds, and simulated ones with heavy tails.
    """
    check_name(name)
    try:
        import torch  # noqa: F401 - only whether it is installed
    except ImportError as error:
        raise MachineError(f"bench.interval_coverage needs {error.name}; install it with: {install_hint('export')}") from error
    from cobra_edge.bench.machine import machine

    from .heavy_tails import measure_tails
    from .interval_coverage_run import measure

    with tempfile.TemporaryDirectory() as folder, stages() as on_step:
        rows = measure(Path(folder), replicates, on_step)
        tails = measure_tails(replicates, on_step)
    result = CoverageResult(model="cobra-mini", replicates=replicates, rows=tuple(rows), tails=tuple(tails), machine=machine())
    file = save_result(name, result)
    if as_json:
        print_json(result)
    else:
        print_result([coverage_table(result), tails_table(result), needed_table(result)], file)


main = main_of(interval_coverage)

if __name__ == "__main__":
    main()
