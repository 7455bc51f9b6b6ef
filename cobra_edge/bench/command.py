"""Bench: measure a bundle on this machine. Results are written to bench/results.

cobra-edge bench export --shape cobra-3b
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import msgspec

from ..errors import InputError
from ..formats.method import recipe_method
from ..formats.quality import DEFAULT_QUALITY, QUALITIES
from ..formats.targets import target_named
from ..inference.session_options import threads_option
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, print_json, progress
from ..terminal.usage import Group
from .decode_command import decode
from .end_to_end_command import end_to_end
from .export_result import ExportedVision, ExportResult, Regressed, export_table
from .results import save_result
from .serving_command import serve
from .shapes import shape_named
from .tables import print_result
from .vision_command import vision

# Benchmarks of the project itself, which run in a checkout.
LABORATORY = (
    "budgets",
    "closed_sets",
    "container_size",
    "fault_injection",
    "interval_coverage",
    "launch_time",
    "methods",
    "narrow_calibration",
    "predict",
    "quality",
    "regress",
)
_RENAMED = {"faults": "fault_injection", "coverage": "interval_coverage"}


class _Benches(Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        name = _RENAMED.get(args[0], args[0]).replace("-", "_")
        if name in LABORATORY:
            raise click.UsageError(f"bench {args[0]} is part of the laboratory; in a checkout: python -m bench.{name}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Benches, epilog="Example: cobra-edge bench decode bundles/demo")
@threads_option
def command(threads: int | None) -> None:
    """Measure speed and memory of a bundle on this machine; results are written to bench/results."""


command.add_command(decode)
command.add_command(end_to_end)
command.add_command(serve)
command.add_command(vision)


@command.command(cls=Command, epilog="Example: cobra-edge bench export --shape cobra-mini --target cpu")
@option("--shape", group="input", default="cobra-3b", help="Published shape, with random weights.")
@option("--target", group="quantization", default="jetson", help="Device profile or family.")
@option("--quality", group="quantization", type=click.Choice(list(QUALITIES)), default=DEFAULT_QUALITY, help="As of an export.")
@option("--interrupt", group="measurement", is_flag=True, help="Kill the export once in each stage that resumes, and go on.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@option("--scratch", group="advanced", type=click.Path(path_type=Path, exists=True), help="Directory for temporary files.")
@debug_option
def export(shape: str, target: str, quality: str, scratch: Path | None, interrupt: bool, as_json: bool) -> None:
    """Measure wall time and peak memory of exporting a checkpoint with random weights and planted outliers, and of `regress`.

    The drift of random weights says nothing about a trained model and is not reported.
    """
    if interrupt and not recipe_method(QUALITIES[quality].method).needs_gradients:
        raise InputError(f"--interrupt: an export of quality {quality} has no stage that resumes; give --quality best")
    shape_named(shape), target_named(target)  # before gigabytes are written
    from .machine import machine
    from .random_export import export_random, regress_random

    with tempfile.TemporaryDirectory(dir=scratch) as folder, progress() as bar:
        bundle = Path(folder) / "bundle"
        exported = export_random(shape, target, ["--quality", quality], Path(folder), bundle, bar, interrupt)
        regressed, report = regress_random(bundle, Path(folder))
    process, manifest = exported.process, exported.manifest
    result = ExportResult(
        shape=shape,
        target=target,
        quality=quality,
        scheme=manifest["recipe"]["scheme"],
        golden_lines=manifest["drift"]["lines"],
        seconds=round(process.seconds, 1),
        killed={stage: round(seconds, 1) for stage, seconds in exported.killed.items()},
        stages={stage: round(seconds, 1) for stage, seconds in exported.stages.items()},
        peak_gib=_gib(process.peak_bytes),
        own_peak_gib=_gib(process.own_peak_bytes),
        checkpoint_bytes=exported.checkpoint_bytes,
        bundle_bytes={name: entry["bytes"] for name, entry in manifest["files"].items()},
        vision=msgspec.convert(manifest["vision"], ExportedVision),
        regress=Regressed(
            lines=report["suite"]["lines"],
            images=report["suite"]["images"],
            within=regressed.exit_code == 0,
            seconds=round(regressed.seconds, 1),
            peak_gib=_gib(regressed.peak_bytes),
            own_peak_gib=_gib(regressed.own_peak_bytes),
        ),
        machine=machine(),
    )
    file = save_result(f"export-{shape}-{quality}", result)
    if as_json:
        print_json(result)
    else:
        print_result([export_table(result)], file)


def _gib(size: int) -> float:
    return round(size / 2**30, 2)
