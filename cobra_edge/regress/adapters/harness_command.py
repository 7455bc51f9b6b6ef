"""What the commands of both benchmark harnesses share: options, import and output of the library, and the report."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from ...environment.requirements import install_hint
from ...errors import MachineError
from ...inference.session_options import session_options
from ...terminal.option_groups import option
from ...terminal.output import debug_option, print_json
from .report import HarnessReport, show, write_report

_OPTIONS = (
    option("--tasks", group="input", required=True, help="Names of tasks or groups, separated by commas."),
    option(
        "--include-path",
        group="input",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Directory with your own tasks.",
    ),
    option("--limit", group="input", type=click.IntRange(1), help="Maximum number of documents per task; default: all."),
    option("--num-fewshot", group="input", type=click.IntRange(0), help="Few-shot examples; default: as the task defines."),
    option("--raw-prompts", group="input", is_flag=True, help="Use contexts as they are, without the bundle's template."),
    session_options,
    option("--out", group="output", type=click.Path(path_type=Path), help="JSON file to write the report to."),
    option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table."),
    debug_option,
)


def harness_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the argument BUNDLE and the options of a benchmark harness to a command."""
    return functools.reduce(lambda wrapped, decorate: decorate(wrapped), reversed(_OPTIONS), function)


@contextlib.contextmanager
def harness(package: str, extra: str) -> Iterator[None]:
    """Import and run a library inside; its output goes to stderr.

    Args:
        package: name of the library in Python.
        extra: our extra that installs it.

    Raises:
        MachineError: the library, or one that a task needs, is not installed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == package:
            raise MachineError(f"{package} is not installed; install it with: {install_hint(extra)}") from error
        raise MachineError(f"a task, or {package}, needs {error.name}, which is not installed; install it first") from error


def finish(report: HarnessReport, out: Path | None, as_json: bool) -> None:
    """Write the report of a run and print it."""
    if out is not None:
        write_report(report, out)
    if as_json:
        print_json(report)
    else:
        show(report)
