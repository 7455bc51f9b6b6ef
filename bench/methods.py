"""`python -m bench.methods`: the methods beside each other at full size, with outliers planted."""

from __future__ import annotations

import click

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.shapes import shape_named
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress, results

_SEQUENCE = 512


def _whole_sequences(_context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value % _SEQUENCE:
        raise click.BadParameter(f"{value} is no multiple of {_SEQUENCE}, the length of a sequence", param=parameter)
    return value


@click.command(epilog="Example: python -m bench.methods --shape cobra-3b --layers 2")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape, filled with random weights.")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="How many are measured.")
@click.option(
    "--positions",
    type=click.IntRange(1),
    default=16384,
    callback=_whole_sequences,
    show_default=True,
    help="To calibrate with.",
)
@click.option(
    "--held-out", type=click.IntRange(1), default=1024, callback=_whole_sequences, show_default=True, help="To take errors on."
)
@click.option(
    "--outliers",
    type=click.FloatRange(0, 0.5),
    default=0.03,
    show_default=True,
    help="Share of channels that are 20 to 60 times louder.",
)
@click.option("--name", help="Of the file in bench/results. Default: methods-SHAPE.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def methods(shape: str, layers: int, positions: int, held_out: int, outliers: float, name: str | None, as_json: bool) -> None:
    """Quantize a few layers by every method: errors on held-out positions, time, memory, and what rounded activations cost.

    Minutes of all layers are extrapolated from those that are measured. Random weights with planted outliers say what a method
    does against outliers, not what a trained model loses.
    """
    config = shape_named(shape).mamba
    name = name or f"methods-{shape}"
    check_name(name)
    if layers > config.n_layer:
        raise InputError(f"--layers {layers}: {shape} has {config.n_layer}")
    try:
        import torch  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise MachineError(f"bench.methods needs {error.name}; install it with: {install_hint('export')}") from error
    from cobra_edge.bench.machine import machine

    from .method_errors import VARIANTS
    from .method_terminal import methods_tables
    from .methods_run import measure_methods

    with progress() as bar:
        task = bar.add_task(f"methods on {shape}", total=layers * (1 + len(VARIANTS)))
        found = measure_methods(config, layers, positions, held_out, outliers, lambda: bar.advance(task))
    result = {"bench": "methods", "model": shape, "weights": "random", **found, "machine": machine()}
    file = save_result(name, result)
    if as_json:
        print_json(result)
        return
    for table in methods_tables(result):
        results.print(table)
    results.print(f"kept: {file}", highlight=False)


main = main_of(methods)

if __name__ == "__main__":
    main()
