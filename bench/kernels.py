"""`python -m bench.kernels`: every kernel of the CUDA decoder compiled for GPUs that are not here, and timed where one is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.progress import Progress
from rich.table import Table

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.shapes import shape_named
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.formats.recipe import ROTATIONS
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.output import cell, debug_option, figure, main_of, print_json, progress, results
from cobra_edge.terminal.suggestions import near_matches

if TYPE_CHECKING:
    from cobra_edge.bench.gpu import Gpu


@click.command(epilog="Example: python -m bench.kernels --shape cobra-3b --scheme w4a16-g128 --capability 8.7")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape.")
@click.option(
    "--scheme", "schemes", multiple=True, default=("w4a16-g128",), show_default=True, help="Weight format; may be given again."
)
@click.option("--rotation", type=click.Choice(list(ROTATIONS)), default="none", show_default=True, help="What is rotated.")
@click.option(
    "--capability", "capabilities", multiple=True, help="Compute capability, may be given again.  [default: all known]"
)
@click.option("--device", type=click.Choice(["cuda"]), help="Time them, too, on this machine's GPU.")
@click.option("--name", help="Of the file in bench/results.  [default: kernels-compiled; with --device gpu-kernels-GPU]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
@click.pass_context
def kernels(
    context: click.Context,
    shape: str,
    schemes: tuple[str, ...],
    rotation: str,
    capabilities: tuple[str, ...],
    device: str | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Compile what a decoder of a shape launches, prompts and one token, for every kind of GPU; no GPU is needed.

    A kernel that would not run there, or that keeps too much outside its registers, is marked and makes the exit code 1.
    """
    mamba = shape_named(shape).mamba
    for scheme in schemes:
        if scheme_named(scheme).code_format != "int":
            raise InputError(f"codes of {scheme} are run by bitsandbytes' kernels, not by these; take another scheme")
    if name is not None:
        check_name(name)
    try:
        from cobra_edge.bench.gpu import gpu_here, short_name
        from cobra_edge.bench.machine import machine

        from . import kernel_cases as bench
    except ImportError as error:
        raise MachineError(f"bench.kernels needs {error.name}; install it with: {install_hint('triton')}") from error
    chosen = _known(capabilities)
    gpu = gpu_here() if device == "cuda" else None
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        for scheme in dict.fromkeys(schemes):
            parts = bench.recorded_shape(mamba, scheme, ROTATIONS[rotation])
            total = sum(len(launches) for launches in parts.values())
            compiled = []
            for capability in chosen:
                task = bar.add_task(f"{scheme} for {capability}", total=total)
                compiled += bench.compiled_rows(parts, capability, partial(bar.advance, task))
            timed = None if gpu is None else _timed(shape, scheme, rotation, gpu, bar)
            rows.append({"scheme": scheme, "launches": bench.counts(parts), "compiled": compiled, "timed": timed})
    result = {
        "bench": "kernels",
        "model": shape,
        "rotation": rotation,
        "most_spilled_bytes": bench.MOST_SPILLED_BYTES,
        "rows": rows,
        "gpu": None if gpu is None else gpu.facts(),
        "machine": msgspec.to_builtins(machine()) | {"triton": _triton_version()},
    }
    default = "kernels-compiled" if gpu is None else f"gpu-kernels-{short_name(gpu.name)}"
    file = save_result(name or default, result)
    if as_json:
        print_json(result)
    else:
        for row in rows:
            results.print(compiled_table(row, chosen))
            results.print(timed_table(row))
        results.print(f"wrote {file}", highlight=False)
    if any(kernel["refused"] for row in rows for kernel in row["compiled"]):
        context.exit(1)


def _known(capabilities: tuple[str, ...]) -> tuple[str, ...]:
    from cobra_edge.decode.cuda.kernels.compiling import CAPABILITIES

    for capability in capabilities:
        if capability not in CAPABILITIES:
            raise InputError(f"unknown compute capability {capability!r}{near_matches(capability, CAPABILITIES)}")
    return tuple(dict.fromkeys(capabilities)) or CAPABILITIES


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _timed(shape: str, scheme: str, rotation: str, gpu: Gpu, bar: Progress) -> list[dict[str, Any]]:
    """Time a decoder of random weights on the GPU."""
    from cobra_edge.decode.cuda.state import GpuState
    from cobra_edge.formats.recipe import uniform_recipe

    from .kernel_cases import alike
    from .kernel_times import measure_kernels, random_gpu_weights
    from .launches import recorded

    mamba = shape_named(shape).mamba
    recipe, _ = uniform_recipe(mamba, scheme_named(scheme), rotations=ROTATIONS[rotation])
    weights = random_gpu_weights(mamba, recipe, gpu.device)
    state = GpuState.blank(mamba, gpu.device, None)
    parts = recorded(weights, state)
    task = bar.add_task(f"{scheme} on {gpu.name}", total=sum(len(alike(launches)) for launches in parts.values()))
    return measure_kernels(parts, weights, gpu, partial(bar.advance, task))


def compiled_table(row: dict[str, Any], capabilities: Sequence[str]) -> Table:
    """Return what each kernel takes, a column a compute capability: registers, KiB of shared memory, bytes spilled."""
    from .kernel_cases import sizes_text

    table = Table(title=f"{row['scheme']}: registers a thread / KiB shared / bytes spilled", title_justify="left")
    table.add_column("kernel")
    table.add_column("launches", justify="right")
    for capability in capabilities:
        table.add_column(capability, justify="right")
    variants: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for kernel in row["compiled"]:
        key = kernel["kernel"], sizes_text(kernel["constants"]), " ".join(kernel["types"])
        variants.setdefault(key, {}).setdefault(kernel["capability"], []).append(kernel)
    for (name, sizes, _types), by_capability in variants.items():
        for index in range(max(len(found) for found in by_capability.values())):  # of several specialisations
            found = {c: kernels[index] for c, kernels in by_capability.items() if index < len(kernels)}
            first = next(iter(found.values()))
            cells = [_taken(found.get(c)) for c in capabilities]
            style = "red" if any(k["refused"] for k in found.values()) else None
            table.add_row(cell(f"{name}\n{sizes}"), str(first["launches"]), *cells, style=style)
    for kernel in row["compiled"]:
        if kernel["refused"]:
            table.add_row(cell(f"{kernel['kernel']} on {kernel['capability']}: {kernel['refused']}"), style="red")
    return table


def _taken(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return ""
    mark = " !" if kernel["refused"] else ""
    return f"{kernel['registers']} / {kernel['shared_bytes'] / 1024:.3g} / {kernel['spilled_bytes']}{mark}"


def timed_table(row: dict[str, Any]) -> Table:
    """Return how long each kernel takes on the GPU that is here."""
    table = Table(title=f"{row['scheme']}: on this machine's GPU", title_justify="left")
    for column in ("part", "kernel", "launches", "µs each", "ms together", "GB/s", "of the bandwidth"):
        table.add_column(column, justify="left" if column in ("part", "kernel") else "right")
    if row["timed"] is None:
        for part, counted in row["launches"].items():
            for kernel, count in counted.items():
                table.add_row(part, cell(kernel), str(count), *[figure(None)] * 4)
        return table
    for timed in row["timed"]:
        us, reached = timed["microseconds"], timed["gb_s"]
        speed = ["", ""] if reached is None else [figure(reached), f"{timed['bandwidth_share']:.1%}"]
        spread = f"{figure(us.median)} ({figure(us.low)}–{figure(us.high)})"
        together = figure(timed["part_milliseconds"])
        table.add_row(timed["part"], cell(timed["kernel"]), str(timed["launches"]), spread, together, *speed)
    return table


main = main_of(kernels)

if __name__ == "__main__":
    main()
