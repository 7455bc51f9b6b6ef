"""`python -m bench`: all commands of the laboratory; each is also `python -m bench.NAME`."""

import click

from cobra_edge.terminal.output import main_of
from cobra_edge.terminal.usage import Group

from .budgets import budgets
from .closed_sets import closed_sets
from .container_size import container_size
from .cuda_paper import cuda_paper
from .emulated_answers import emulated_answers
from .fault_injection import fault_injection
from .figures import figures
from .gpu_answers import gpu_answers
from .gpu_kernels import gpu_kernels
from .gpu_parity import gpu_parity
from .gpu_prepare import gpu_prepare
from .gpu_sanitizer import gpu_sanitizer
from .gpu_weights import gpu_weights
from .interval_coverage import interval_coverage
from .kernel_budget import kernel_budget
from .launch_time import launch_time
from .methods import methods
from .narrow_calibration import narrow_calibration
from .predict import predict
from .quality import quality
from .recorded_limits import recorded_limits
from .regress import regress
from .rivals import rivals
from .vision import vision

COMMANDS = (
    budgets,
    closed_sets,
    container_size,
    cuda_paper,
    emulated_answers,
    fault_injection,
    figures,
    gpu_answers,
    gpu_kernels,
    gpu_parity,
    gpu_prepare,
    gpu_sanitizer,
    gpu_weights,
    interval_coverage,
    kernel_budget,
    launch_time,
    methods,
    narrow_calibration,
    predict,
    quality,
    recorded_limits,
    regress,
    rivals,
    vision,
)


@click.group(cls=Group, epilog="Example: python -m bench figures --check")
def command() -> None:
    """Measure the project itself: quality, fault injection, intervals, GPU kernels, predictions; write bench/results."""


for each in COMMANDS:
    command.add_command(each)

if __name__ == "__main__":
    main_of(command)()
