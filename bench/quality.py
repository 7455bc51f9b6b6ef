"""`python -m bench.quality`: drift and accuracy of every build of cobra-mini, and of peers on the same weights."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
from msgspec import structs

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.tables import print_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json
from cobra_edge.terminal.suggestions import near_matches


@click.command(cls=Command, epilog="Example: python -m bench.quality --only w4a16-g128")
@option("--only", group="measurement", multiple=True, metavar="LABEL", help="Measure only this build or peer; repeatable.")
@option("--name", group="output", help="Name of the file in bench/results.  [default: quality; quality-only with --only]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@option(
    "--peer-python",
    group="advanced",
    default=sys.executable,
    show_default=False,
    help="Python interpreter with llama-cpp-python.  [default: this one]",
)
@debug_option
def quality(peer_python: str, only: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """Measure drift from float and accuracy of each build and peer on cobra-mini's held-out suite.

    A peer whose library is missing is skipped with a message. A peer whose float form differs from the reference ends the run.
    """
    name = name or ("quality-only" if only else "quality")
    check_name(name)
    try:
        import torch  # noqa: F401 - only whether it is installed
    except ImportError as error:
        raise MachineError(f"bench.quality needs {error.name}; install it with: {install_hint('export')}") from error
    from cobra_edge.bench.machine import machine

    from .quality_comparison import known_labels, measure
    from .quality_result import QualityResult, quality_summary

    for label in only:
        if label not in known_labels():
            raise InputError(f"unknown build {label!r}{near_matches(label, known_labels())}")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), peer_python, only)
    result = QualityResult(**structs.asdict(found), model="cobra-mini", machine=machine())
    file = save_result(name, result)
    if as_json:
        print_json(result)
    else:
        print_result([quality_summary(result)], file)


main = main_of(quality)

if __name__ == "__main__":
    main()
