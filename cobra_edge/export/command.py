"""Export a checkpoint as a bundle that a device runs.

cobra-edge export --target jetson
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ..environment.memory import keep_freed_memory
from ..errors import DriftError
from ..formats.method import METHODS
from ..formats.precision import PRECISIONS
from ..formats.quality import DEFAULT_QUALITY, QUALITIES
from ..formats.recipe import ROTATIONS
from ..formats.targets import Target, target_named
from ..inference.session_options import threads_option
from ..regress.bundle_tables import drift_table, memory_table, recipe_line
from ..regress.gates import failures
from ..suite.reader import FEWEST_IMAGES
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, duration, main_of, print_json, results, say, tell
from .choices import choice_tables, choices
from .pipeline import Exported, export_bundle
from .vision import ENGINES

_PATH = click.Path(path_type=Path)


@click.command(cls=Command, epilog="Example: cobra-edge export --target jetson --checkpoint mini --out bundles/mini --force")
@option(
    "--target", "target_name", group="input", metavar="NAME", help="Device or family: jetson, rtx-4090, cpu, …; see --list."
)
@option(
    "--checkpoint",
    group="input",
    metavar="SOURCE",
    show_default="mini",
    help="mini, cobra+3b (downloaded from the hub) or a directory.",
)
@option("--vision-weights", group="input", type=_PATH, help="Directory with the safetensors of the vision encoders.")
@option("--tokenizer", group="input", type=_PATH, help="tokenizer.json or its directory.")
@option(
    "--golden",
    group="input",
    type=_PATH,
    show_default="images held out of --calibration, or the embedded suite",
    help="Suite that drift is measured on.",
)
@option(
    "--golden-lines",
    group="input",
    type=click.IntRange(FEWEST_IMAGES, 10_000),
    show_default="all, or 64 for large models",
    help="Lines of the golden suite to use.",
)
@option(
    "--quality",
    group="quantization",
    type=click.Choice(list(QUALITIES)),
    show_default=DEFAULT_QUALITY,
    help="What to quantize by: gradients, statistics, or the weights alone; the first drifts least and takes longest.",
)
@option(
    "--scheme",
    group="quantization",
    metavar="NAME",
    show_default="of the target",
    help="One weight format for every matrix; see --list.",
)
@option(
    "--method",
    group="quantization",
    type=click.Choice(list(METHODS)),
    show_default="of --quality",
    help="Quantization method; then --rotation and --bits are none unless given.",
)
@option(
    "--rotation",
    group="quantization",
    type=click.Choice(list(ROTATIONS)),
    show_default="of --quality",
    help="Hadamard rotation, which spreads outliers over channels: of out_proj's input, the residual stream, or both.",
)
@option(
    "--bits",
    group="quantization",
    type=click.FloatRange(0, min_open=True),
    show_default="of the target with --quality best",
    help="Budget of bits per weight; each matrix gets the scheme that costs least KLD within it. Replaces --scheme.",
)
@option(
    "--activations",
    group="quantization",
    type=click.Choice(("float32", "int8")),
    show_default="of the target's scheme",
    help="Activations in quantized matmuls, with --bits.",
)
@option("--sensitivity", group="quantization", type=_PATH, help="File written by `sensitivity`, to reuse with --bits.")
@option("--statistics", group="quantization", type=_PATH, help="File written by `calibrate`, to reuse.")
@option(
    "--calibration",
    group="quantization",
    type=_PATH,
    show_default="drawn images",
    help="Folder of images, or suite, for statistics, --bits and int8 vision. Images get prompts, the float model answers.",
)
@option("--skip-bad", group="quantization", is_flag=True, help="Leave out what cannot be read of --calibration.")
@option(
    "--clip-activations",
    group="quantization",
    type=click.FloatRange(0, 100, min_open=True),
    help="Clip int8 activations at this percentile of their magnitudes, such as 99.9.",
)
@option(
    "--vision-precision",
    group="quantization",
    metavar="[" + "|".join(PRECISIONS) + "]",
    show_default="of the target",
    help="Precision of the vision graph's matmuls.",
)
@option("--out", group="output", type=_PATH, show_default="bundles/MODEL-TARGET-QUALITY", help="Directory of the bundle.")
@option("--force", group="output", is_flag=True, help="Replace an existing bundle.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@option(
    "--list",
    "list_only",
    group="output",
    is_flag=True,
    help="List targets, schemes, qualities, methods, rotations and checkpoints, and exit.",
)
@option(
    "--device",
    group="advanced",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    help="Device that collects statistics and generates answers; gradients are for the CPU.",
)
@option("--budget", group="advanced", type=_PATH, show_default="embedded", help="Drift budget (TOML).")
@option(
    "--vision-input",
    group="advanced",
    type=click.Choice(("uint8", "float32")),
    show_default="uint8",
    help="Input of the vision graph: decoded images (uint8) or normalized pixels (float32).",
)
@option(
    "--engine",
    group="advanced",
    type=click.Choice(ENGINES),
    default="auto",
    help="For RTX targets, build the vision engine now, with weights embedded or stripped.",
)
@threads_option
@debug_option
def command(
    list_only: bool,
    target_name: str | None,
    checkpoint: str | None,
    as_json: bool,
    out: Path | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Export a checkpoint as a bundle for a device, and measure its drift from the float model.

    With --calibration, a folder of images is enough: they get prompts of a shipped list, the float model's own answers are the
    answers, and one image in five is held out to measure drift on. Answers take time in proportion to their tokens. They are
    kept in a hidden file beside OUT until the export is done, so that the same command resumes.

    Exit codes: 0 done; 1 done, but the drift budget is exceeded; 2 bad input; 3 this machine lacks something; 130 interrupted,
    nothing is left behind but what the same command resumes from.
    """
    if list_only:
        _list(as_json)
        return
    if target_name is None:
        raise click.UsageError("Missing option '--target'; see export --list", click.get_current_context())
    target = target_named(target_name)
    if checkpoint is None:
        tell("no --checkpoint given: exporting the embedded cobra-mini, a small model of synthetic scenes")
    keep_freed_memory()
    exported = export_bundle(checkpoint or "mini", target, out, **options)
    _show(exported, target, as_json)
    if reasons := failures(exported.verdicts):
        raise DriftError(
            f"{'; '.join(reasons)}; the bundle is kept for inspection at {exported.directory}, do not ship it: use more bits, "
            "another method, or more lines where an interval is too wide"
        )


def _show(exported: Exported, target: Target, as_json: bool) -> None:
    if as_json:
        print_json({
            "bundle": str(exported.directory),
            "manifest": exported.manifest,
            "kept_float16": exported.kept_float,
            "drift_verdicts": exported.verdicts,
            "bit_allocation": exported.allocation,
            "seconds": exported.seconds,
            "estimated_seconds": exported.estimated_seconds,
        })  # fmt: skip
        return
    for name, reason in exported.kept_float.items():
        say(f"kept in float16: {name} ({reason})")
    if exported.allocation is not None:
        found = exported.allocation
        kld, of = (found.kld_alone, "expected KLD") if found.kld is None else (found.kld, "KLD")
        drift = f", {of} {kld:.3g} nats on the calibration data" if math.isfinite(kld) else ""
        say(f"bit allocation: {found.bits_per_weight:.3f} bits per weight{drift}")
    say(f"recipe: {recipe_line(exported.manifest)}")
    results.print(memory_table(exported.manifest, target))
    results.print(drift_table(exported.manifest, exported.verdicts))
    say(f"time: {', '.join(f'{stage} {duration(seconds)}' for stage, seconds in exported.seconds.items() if seconds >= 1)}")
    say(f"bundle: {exported.directory}")


def _list(as_json: bool) -> None:
    if as_json:
        print_json(choices())
    else:
        for table in choice_tables():
            results.print(table)


main = main_of(command)

if __name__ == "__main__":
    main()
