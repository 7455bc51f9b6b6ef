"""`python -m bench`: all commands of the laboratory; each is also `python -m bench.NAME`."""

import click

from cobra_edge.terminal.output import main_of
from cobra_edge.terminal.usage import Group

from .budgets import budgets
from .cuda_paper import cuda_paper
from .fault_injection import fault_injection
from .figures import figures
from .interval_coverage import interval_coverage
from .kernel_budget import kernel_budget
from .methods import methods
from .predict import predict
from .quality import quality
from .regress import regress
from .vision import vision

COMMANDS = (
    budgets,
    cuda_paper,
    fault_injection,
    figures,
    interval_coverage,
    kernel_budget,
    methods,
    predict,
    quality,
    regress,
    vision,
)


@click.group(cls=Group, epilog="Example: python -m bench figures --check")
def command() -> None:
    """Measure the project itself: quality, fault injection, interval coverage, predictions; write bench/results."""


for each in COMMANDS:
    command.add_command(each)

if __name__ == "__main__":
    main_of(command)()
