"""Bench: measure, and keep the result.

python -m cobra_edge.bench export --shape cobra-3b
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.table import Table

from ..scheme import scheme_named
from ..session_options import threads_option
from ..tables import figure
from ..targets import target_named
from ..terminal import debug_option, print_json, progress, results
from ..usage import Group
from .coverage_verb import coverage
from .decode_verb import decode
from .end_to_end_verb import end_to_end
from .faults_verb import budgets, faults
from .kernels_verb import kernels
from .methods_verb import methods
from .prediction_verb import predict
from .quality_verb import quality
from .results import keep
from .serving_verb import serve
from .shapes import shape_named
from .suite_cost_verb import regress
from .tiles_verb import tiles
from .vision_verb import vision


@click.group(cls=Group, epilog="Example: python -m cobra_edge.bench --threads 2 export --shape cobra-3b")
@threads_option
def command(threads: int | None) -> None:
    """Measure, and keep the result under bench/results."""


command.add_command(coverage)
command.add_command(budgets)
command.add_command(decode)
command.add_command(end_to_end)
command.add_command(faults)
command.add_command(kernels)
command.add_command(methods)
command.add_command(predict)
command.add_command(quality)
command.add_command(regress)
command.add_command(serve)
command.add_command(tiles)
command.add_command(vision)


@command.command(epilog="Example: python -m cobra_edge.bench export --shape cobra-3b --scratch /tmp")
@click.option("--shape", default="cobra-3b", show_default=True, help="A published shape, filled with random weights.")
@click.option("--target", default="jetson", show_default=True, help="Device profile or family.")
@click.option("--scheme", default="w4a16-g128", show_default=True, help="Weight format.")
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Where to put checkpoint and bundle.")
@click.option("--golden-lines", type=click.IntRange(1), default=2, show_default=True, help="How many golden lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def export(shape: str, target: str, scheme: str, scratch: Path | None, golden_lines: int, as_json: bool) -> None:
    """Export a random checkpoint of a published shape; wall time and peak memory of the whole command.

    The drift of random weights says nothing about a trained model and is not kept.
    """
    shape_named(shape), scheme_named(scheme), target_named(target)  # before gigabytes are written
    from .machine import machine
    from .random_export import export_random

    with tempfile.TemporaryDirectory(dir=scratch) as folder, progress() as bar:
        made = export_random(shape, target, scheme, golden_lines, Path(folder), Path(folder) / "bundle", bar)
    done, manifest = made.done, made.manifest
    files = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    result = {
        "bench": "export",
        "shape": shape,
        "target": target,
        "scheme": scheme,
        "golden_lines": golden_lines,
        "seconds": round(done.seconds, 1),
        "peak_gib": round(done.peak_bytes / 2**30, 2),
        "checkpoint_bytes": made.checkpoint_bytes,
        "bundle_bytes": files,
        "vision": manifest["vision"],
        "machine": machine(),
    }
    file = keep(f"export-{shape}", result)
    if as_json:
        print_json(result)
        return
    table = Table(title=f"export of {shape} as {scheme} for {target}", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("wall time, minutes", f"{done.seconds / 60:.1f}")
    table.add_row("peak resident memory, GiB", f"{done.peak_bytes / 2**30:.2f}")
    table.add_row("checkpoint, GB", f"{made.checkpoint_bytes / 1e9:.2f}")
    table.add_row("bundle, GB", f"{sum(files.values()) / 1e9:.2f}")
    table.add_row("vision graph against torch, relative RMS", figure(result["vision"]["parity"]["projector"]))
    results.print(table)
    results.print(f"kept: {file}", highlight=False)
