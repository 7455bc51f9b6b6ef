"""What the commands of the harnesses share: their options, and how a run begins and ends."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ...decode.backends import DEVICES, KERNELS
from ...decode.decoder import ACTIVATIONS
from ...environment.requirements import install_hint
from ...errors import MachineError
from ...inference.session_options import threads_option
from ...terminal.output import debug_option, print_json
from ...vision.runtimes import RUNTIME_NAMES
from .model_adapter import ModelAdapter
from .report import report_of, show, write_report

_OPTIONS = (
    click.argument("bundle", type=click.Path(path_type=Path)),
    click.option("--tasks", required=True, help="Names of tasks or groups, commas between them."),
    click.option(
        "--include-path",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="A directory of tasks of your own.",
    ),
    click.option("--limit", type=click.IntRange(1), help="How many documents of each task; default: all."),
    click.option("--num-fewshot", type=click.IntRange(0), help="Examples in front of a question; default: as the task says."),
    click.option("--raw-prompts", is_flag=True, help="Read contexts as they are, not worded by the bundle's template."),
    click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where it runs."),
    click.option("--decoder-kernels", type=click.Choice(KERNELS), default="auto", show_default=True, help="Which decoder."),
    click.option("--vision-runtime", type=click.Choice(RUNTIME_NAMES), default="auto", show_default=True, help="What sees."),
    threads_option,
    click.option("--activations", type=click.Choice(ACTIVATIONS), help="What enters a product. Default: as the recipe says."),
    click.option("--out", type=click.Path(path_type=Path), help="Write the report there too, as JSON."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
    debug_option,
)


def harness_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument and the options of a harness."""
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), function)


@contextlib.contextmanager
def harness(package: str, extra: str) -> Iterator[None]:
    """Import and run a library: what it prints goes to stderr.

    Args:
        package: the library's name in Python.
        extra: of ours that installs it.

    Raises:
        MachineError: it is not installed, or a task needs something that is not.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == package:
            raise MachineError(f"{package} is not installed; install it with: {install_hint(extra)}") from error
        raise MachineError(f"a task, or {package}, needs {error.name}, which is not installed; install that first") from error


def finish(
    name: str, version: str, model_adapter: ModelAdapter, found: dict[str, Any], out: Path | None, as_json: bool
) -> None:
    """Write the report of a run and print it."""
    report = report_of(name, version, model_adapter, found)
    if out is not None:
        write_report(report, out)
    if as_json:
        print_json(report)
    else:
        show(report)
