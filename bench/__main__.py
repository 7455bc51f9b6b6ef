"""`python -m bench`: the laboratory's commands, each also `python -m bench.NAME`."""

import click

from cobra_edge.terminal.output import main_of
from cobra_edge.terminal.usage import Group

from .budgets import budgets
from .fault_injection import fault_injection
from .interval_coverage import interval_coverage
from .kernels import kernels
from .methods import methods
from .predict import predict
from .quality import quality
from .regress import regress
from .tiles import tiles
from .vision import vision


@click.group(cls=Group, epilog="Example: python -m bench quality")
def command() -> None:
    """Measure the project itself: contests, planted fault_injection, coverage, tuning, predictions. Results go to bench/results."""


for each in (budgets, interval_coverage, fault_injection, kernels, methods, predict, quality, regress, tiles, vision):
    command.add_command(each)

if __name__ == "__main__":
    main_of(command)()
