"""`python -m bench.methods`: quantization methods compared at full size, on layers with outlier channels."""

from __future__ import annotations

import click
from msgspec import structs

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.shapes import shape_named
from cobra_edge.bench.tables import print_result
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.terminal.option_groups import Command, option
from cobra_edge.terminal.output import debug_option, main_of, print_json, progress

from .methods_result import MethodsResult, methods_tables

_SEQUENCE = 512


def _whole_sequences(_context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value % _SEQUENCE:
        raise click.BadParameter(f"{value} is not a multiple of {_SEQUENCE}, the length of a sequence", param=parameter)
    return value


@click.command(cls=Command, epilog="Example: python -m bench.methods --shape cobra-3b --layers 2")
@option("--shape", group="input", default="cobra-3b", help="Published shape, with random weights.")
@option("--layers", group="measurement", type=click.IntRange(1), default=2, help="Layers to measure.")
@option(
    "--positions",
    group="measurement",
    type=click.IntRange(1),
    default=16384,
    callback=_whole_sequences,
    help="Positions for calibration.",
)
@option(
    "--held-out",
    group="measurement",
    type=click.IntRange(1),
    default=1024,
    callback=_whole_sequences,
    help="Positions for the errors.",
)
@option(
    "--outliers",
    group="measurement",
    type=click.FloatRange(0, 0.5),
    default=0.03,
    help="Share of outlier channels, with gains of 20 to 60.",
)
@option("--name", group="output", help="Name of the file in bench/results.  [default: methods-SHAPE]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def methods(shape: str, layers: int, positions: int, held_out: int, outliers: float, name: str | None, as_json: bool) -> None:
    """Quantize a few layers by every method: errors on held-out positions, time, memory, and the cost of int8 activations.

    Minutes for all layers are extrapolated. Random weights with outlier channels show how a method handles outliers, not how
    much a trained model loses.
    """
    config = shape_named(shape).mamba
    name = name or f"methods-{shape}"
    check_name(name)
    if layers > config.n_layer:
        raise InputError(f"--layers {layers}: {shape} has {config.n_layer}")
    try:
        import torch  # noqa: F401 - only whether it is installed
    except ImportError as error:
        raise MachineError(f"bench.methods needs {error.name}; install it with: {install_hint('export')}") from error
    from cobra_edge.bench.machine import machine

    from .method_errors import VARIANTS
    from .methods_run import measure_methods

    with progress() as bar:
        task = bar.add_task(f"methods on {shape}", total=layers * (1 + len(VARIANTS)))
        found = measure_methods(config, layers, positions, held_out, outliers, lambda: bar.advance(task))
    result = MethodsResult(**structs.asdict(found), model=shape, machine=machine())
    file = save_result(name, result)
    if as_json:
        print_json(result)
    else:
        print_result(methods_tables(result), file)


main = main_of(methods)

if __name__ == "__main__":
    main()
