"""Bench: measure a bundle on this machine, and keep the result.

python -m cobra_edge.bench export --shape cobra-3b
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.table import Table

from ..formats.scheme import scheme_named
from ..formats.targets import target_named
from ..inference.session_options import threads_option
from ..terminal.output import debug_option, figure, print_json, progress, results
from ..terminal.usage import Group
from .decode_command import decode
from .end_to_end_command import end_to_end
from .results import save_result
from .serving_command import serve
from .shapes import shape_named
from .vision_command import vision

# What measures the project and not a bundle is run in a checkout.
LABORATORY = ("budgets", "fault_injection", "interval_coverage", "kernels", "methods", "predict", "quality", "regress", "tiles")


class _Benches(Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in LABORATORY:
            raise click.UsageError(f"bench {args[0]} is part of the laboratory; in a checkout: python -m bench.{args[0]}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Benches, epilog="Example: python -m cobra_edge.bench --threads 2 export --shape cobra-3b")
@threads_option
def command(threads: int | None) -> None:
    """Measure, and keep the result under bench/results."""


command.add_command(decode)
command.add_command(end_to_end)
command.add_command(serve)
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
    file = save_result(f"export-{shape}", result)
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
