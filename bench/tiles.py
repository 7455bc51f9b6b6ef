"""`python -m bench.tiles`: find, on this machine's GPU, how each kernel is to cut its work, and put it into tiles.toml."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import Progress
from rich.table import Table

from cobra_edge.bench.results import check_name, save_result
from cobra_edge.bench.shapes import shape_named
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import InputError, MachineError
from cobra_edge.formats.scheme import scheme_named
from cobra_edge.terminal.output import cell, debug_option, figure, main_of, print_json, progress, results, tell
from cobra_edge.terminal.suggestions import near_matches

if TYPE_CHECKING:
    from cobra_edge.bench.gpu import Gpu

    from .tile_cases import Case, Grid
    from .tuning import Tried

_SHOWN = 4  # candidates of a case in the table


@click.command(epilog="Example: python -m bench.tiles --kernel multiply_one --scheme w4a16-g128")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape.")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    default=("w4a16-g128", "w8a16-g128", "w3a16-g64", "fp16"),
    show_default=True,
    help="Whose bits; may be given again.",
)
@click.option("--kernel", "kernels", multiple=True, help="Only this one; may be given again.  [default: every grid's]")
@click.option("--minutes", type=click.FloatRange(0), help="Begin no other kernel after so long.  [default: no limit]")
@click.option("--jobs", type=click.IntRange(0), help="Compile with so many processes beforehand.  [default: one a processor]")
@click.option("--out", type=click.Path(path_type=Path), help="The table to write.  [default: the package's tiles.toml]")
@click.option("--name", help="Of the file in bench/results.  [default: gpu-tiles-GPU]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def tiles(
    shape: str,
    schemes: tuple[str, ...],
    kernels: tuple[str, ...],
    minutes: float | None,
    jobs: int | None,
    out: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Try sizes for every kernel at full size on this machine's GPU; the fastest become the GPU's rows in tiles.toml.

    A candidate is timed only when it does what its plain reference does. Candidates take turns.
    """
    mamba = shape_named(shape).mamba
    for scheme in schemes:
        if scheme_named(scheme).code_format != "int":
            raise InputError(f"codes of {scheme} are run by bitsandbytes' kernels, not by these; take another scheme")
    if name is not None:
        check_name(name)
    try:
        import tomlkit  # noqa: F401 - only whether it is there

        from cobra_edge.bench.gpu import gpu_here, short_name
        from cobra_edge.bench.machine import machine
        from cobra_edge.decode.cuda.kernels.tiles import TILES, capability_of

        from .tile_cases import GRID, grids
        from .tuning import complete, rows_of, write_rows
    except ImportError as error:
        raise MachineError(f"bench.tiles needs {error.name}; install it with: {install_hint('cuda', 'regress')}") from error
    known = grids()
    for kernel in kernels:
        if kernel not in {g.kernel for g in known}:
            raise InputError(f"{GRID.name} has no grid for {kernel!r}{near_matches(kernel, sorted({g.kernel for g in known}))}")
    chosen = [g for g in known if not kernels or g.kernel in kernels]
    gpu = gpu_here()
    capability = capability_of(gpu.device)
    with progress() as bar:
        if jobs != 0:
            _compile_beforehand(shape, schemes, chosen, capability, jobs, bar)
        found = _tuned(mamba, schemes, chosen, gpu, minutes, bar)
    rows = complete(rows_of(found, capability), chosen, gpu.device)
    write_rows(out or TILES, capability, rows)
    result = {
        "bench": "tiles",
        "model": shape,
        "schemes": list(schemes),
        "gpu": gpu.facts(),
        "rows": [_described(case, tried) for case, tried in found],
        "machine": machine(),
    }
    file = save_result(name or f"gpu-tiles-{short_name(gpu.name)}", result)
    if as_json:
        print_json(result)
        return
    results.print(tiles_table(found, capability))
    results.print(f"wrote {file}, and {len(rows)} rows of {out or TILES}", highlight=False)


def _compile_beforehand(
    shape: str, schemes: tuple[str, ...], chosen: list[Grid], capability: str, jobs: int | None, bar: Progress
) -> None:
    """Fill Triton's cache by several processes: what a GPU waits for most is the compiler."""
    from .tile_compiling import compile_candidates, tasks_of

    tasks = tasks_of(shape, schemes, chosen, capability)
    task = bar.add_task("compiling candidates", total=len(tasks))
    compile_candidates(tasks, jobs, partial(bar.advance, task))


def _tuned(
    mamba: Any, schemes: tuple[str, ...], chosen: list[Grid], gpu: Gpu, minutes: float | None, bar: Progress
) -> list[tuple[Case, list[Tried]]]:
    from cobra_edge.bench.gpu import captured
    from cobra_edge.formats.recipe import uniform_recipe

    from .kernel_times import random_gpu_weights, time_in_turns
    from .tile_cases import Cases
    from .tuning import tune

    began, found, done = time.monotonic(), list[tuple[Any, list[Any]]](), set[tuple[str, int, int]]()
    task = bar.add_task("timing", total=len(schemes) * len(chosen))
    for scheme in dict.fromkeys(schemes):
        recipe, _ = uniform_recipe(mamba, scheme_named(scheme))
        cases = Cases(random_gpu_weights(mamba, recipe, gpu.device))
        for grid in chosen:
            bar.advance(task)
            case = cases.of(grid.kernel, grid.max_tokens)
            if (case.kernel, case.bits, case.max_tokens) in done:
                continue
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                tell(f"no time left for {case.title}; its row stays")
                continue
            done.add((case.kernel, case.bits, case.max_tokens))
            timer = partial(time_in_turns, gpu=gpu)
            found.append((case, tune(case, grid.candidates(), timer, partial(captured, gpu=gpu), gpu.device)))
    return found


def _described(case: Case, tried: list[Tried]) -> dict[str, Any]:
    from .tuning import best

    chosen = best(tried)
    return {
        "kernel": case.kernel,
        "bits": case.bits,
        "max_tokens": case.max_tokens,
        "chosen": None if chosen is None else chosen.sizes,
        "tried": [{"sizes": t.sizes, "seconds": t.seconds, "refused": t.refused} for t in tried],
    }


def tiles_table(found: list[tuple[Case, list[Tried]]], capability: str) -> Table:
    """Return, of each kernel, the sizes in use before and the fastest ones."""
    from .tuning import best, fastest_first

    table = Table(title=f"sizes on a GPU of compute capability {capability}", title_justify="left")
    for column in ("kernel", "sizes", "µs", ""):
        table.add_column(column, justify="right" if column == "µs" else "left")
    for case, tried in found:
        chosen, refused = best(tried), sum(t.refused is not None for t in tried)
        shown = [t for t in fastest_first(tried)[:_SHOWN] if t is not tried[0]] + [tried[0]]
        for index, one in enumerate(shown):
            marks = [word for word, holds in (("chosen", one is chosen), ("in use before", one is tried[0])) if holds]
            us = "refused" if one.seconds is None else figure(one.seconds.median * 1e6)
            sizes = " ".join(f"{k}={v}" for k, v in one.sizes.items())
            table.add_row(cell(case.title if index == 0 else ""), cell(sizes), us, ", ".join(marks))
        table.add_row("", f"{len(tried)} tried, {refused} refused", "", "")
    return table


main = main_of(tiles)

if __name__ == "__main__":
    main()
