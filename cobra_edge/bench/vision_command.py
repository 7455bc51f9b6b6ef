"""`bench vision`: the vision graph in every precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.precision import PRECISIONS
from ..formats.targets import target_named
from ..terminal.output import debug_option, print_json, results, tell
from .results import check_name, save_result
from .shapes import shape_named

Judge = Callable[[list[Path], Callable[[str], None]], list[dict[str, Any]]]


@click.command(epilog="Example: python -m cobra_edge.bench vision --shape cobra-3b --engine fp16")
@click.option("--shape", default="cobra-mini", show_default=True, help="cobra-mini, or a published shape of random weights.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(list(PRECISIONS)),
    help="Measure this one only; may be given again.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(list(PRECISIONS)),
    help="Build a TensorRT for RTX engine of this precision too; may be given again.",
)
@click.option("--target", default="rtx-4090", show_default=True, help="What engines are built for.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Of latency, precisions in turns.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where to put the graphs.")
@click.option("--name", help="Of the file in bench/results. Default: vision-SHAPE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def vision(
    shape: str,
    precisions: tuple[str, ...],
    engines: tuple[str, ...],
    target: str,
    rounds: int,
    scratch: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Write the vision graph in each precision: latency, peak memory, file size, distance from torch; engines."""
    measure_and_keep(shape, precisions, engines, target, rounds, scratch, name, as_json)


def measure_and_keep(
    shape: str,
    precisions: tuple[str, ...],
    engines: tuple[str, ...],
    target: str,
    rounds: int,
    scratch: Path | None,
    name: str | None,
    as_json: bool,
    judge: Judge | None = None,
) -> None:
    """Measure, keep the result under bench/results and print it.

    Args:
        shape: "cobra-mini" or a published shape.
        precisions: of the graph; all when empty.
        engines: precisions of which a TensorRT for RTX engine is built too.
        target: what engines are built for.
        rounds: of latency, precisions in turns.
        scratch: where graphs are written.
        name: of the file in bench/results.
        as_json: print one JSON object.
        judge: what says of the written graphs how they change answers; by default nobody does.

    Raises:
        InputError, MachineError: an option or a library is missing.
    """
    chosen = precisions or tuple(PRECISIONS)
    name = name or f"vision-{shape}"
    check_name(name)
    shape_named(shape), target_named(target)
    if set(engines) - set(chosen):
        raise InputError(f"--engine {', '.join(sorted(set(engines) - set(chosen)))}: of a precision that is not measured")
    try:
        import scipy  # noqa: F401 - only whether it is there
        import torch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"bench vision needs {error.name}; install it with: {install_hint('export', 'regress')}") from error
    if engines:
        from ..vision.engines.tensorrt_rtx import require_tensorrt_rtx

        require_tensorrt_rtx()
    from .machine import machine
    from .vision import measure_vision

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        found = measure_vision(shape, chosen, engines, target, rounds, Path(folder), tell)
        if judge is not None:
            found["answers"] = judge([Path(folder) / p for p in chosen], tell)
    result = {"bench": "vision", **found, "machine": machine()}
    file = save_result(name, result)
    if as_json:
        print_json(result)
        return
    results.print(_terminal_table(result))
    results.print(f"kept: {file}", highlight=False)


def _terminal_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"vision graph of {result['shape']}", title_justify="left")
    table.add_column("precision")
    answers = {row["precision"]: row for row in result.get("answers", ())}
    columns = [
        "MB",
        "latency, ms",
        "of the product rate",
        "peak, GiB",
        "parity",
        "written in, s",
        *(["KLD"] if answers else []),
    ]
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["rows"]:
        timed = "latency_ms" in row
        cells = [f"{row['bytes'] / 1e6:,.1f}", f"{row['latency_ms']['median']:,.1f}" if timed else "not on a CPU"]
        cells += [
            f"{row['share_of_matmul_rate']['median']:.0%}" if timed else "",
            f"{row['run_peak_gib']:.2f}" if timed else "",
        ]
        cells += [f"{row['parity']['projector']:.1e}", f"{row['write_seconds']:.0f}"]
        cells += [f"{answers[row['precision']]['kld_mean']['value']:.1e}"] if answers else []
        table.add_row(row["precision"], *cells)
    return table
