"""Export: from a checkpoint to a bundle that a device runs.

python -m cobra_edge.export --target jetson
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import DriftError
from ..formats.recipe import METHODS, ROTATIONS
from ..formats.targets import target_named
from ..inference.session_options import threads_option
from ..regress.bundle_tables import drift_table, memory_table
from ..suite.reader import HELDOUT
from ..terminal.output import debug_option, main_of, print_json, results, say, tell
from .choices import choice_tables, choices
from .pipeline import export_bundle
from .vision import ENGINES


@click.command(epilog="Example: python -m cobra_edge.export --target jetson --checkpoint mini --out bundles/mini --force")
@click.option(
    "--list",
    "list_only",
    is_flag=True,
    help="Print targets, schemes, methods, rotations and names of checkpoints, with --json as an object.",
)
@click.option("--target", "target_name", help="Device profile or family: jetson, rtx-4090, cpu, …; see --list.")
@click.option("--checkpoint", default=None, help="mini (default), cobra+3b of the hub, or a directory (docs/checkpoints.md).")
@click.option("--scheme", default=None, help="Weight format, such as w4a16-g128; default: the target's; see --list.")
@click.option("--method", type=click.Choice(METHODS), default="rtn", show_default=True, help="How codes are chosen.")
@click.option(
    "--rotation",
    type=click.Choice(list(ROTATIONS)),
    default="none",
    show_default=True,
    help="Spread outliers over all channels by Hadamard matrices: of out_proj's input, the residual stream, or both.",
)
@click.option("--bits", type=click.FloatRange(0, min_open=True), help="Mix schemes: the best mix within so many bits a weight.")
@click.option(
    "--activations",
    type=click.Choice(("float32", "int8")),
    help="What enters the products of a mix (--bits); default: as in the target's scheme.",
)
@click.option("--sensitivity", type=click.Path(path_type=Path), help="What sensitivity wrote of this checkpoint, for --bits.")
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    help="What calibrate wrote of this checkpoint, for --clip-activations and all methods but rtn.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSON lines for statistics, where none are given, for --bits and int8 vision.",
)
@click.option(
    "--clip-activations",
    type=click.FloatRange(0, 100, min_open=True),
    help="Clip rounded activations at this percentile of their magnitudes, such as 99.9.",
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Directory of the bundle.")
@click.option("--force", is_flag=True, help="Replace a bundle that is already there.")
@click.option("--vision-precision", help="fp32, fp16, bf16 or int8: of the vision graph's products; default: the target's.")
@click.option(
    "--vision-input",
    type=click.Choice(("uint8", "float32")),
    help="What the vision graph takes: pictures as decoded (uint8, the default), or normalised pixels.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    show_default=True,
    help="RTX targets: build the vision engine now, its weights embedded or stripped (taken from the graph when opened).",
)
@click.option("--vision-weights", type=click.Path(path_type=Path), help="Directory with the encoders' safetensors.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json or its directory.")
@click.option("--golden", type=click.Path(path_type=Path), default=HELDOUT, help="Suite for the golden lines.")
@click.option("--golden-lines", type=click.IntRange(1, 10_000), help="How many golden lines; default all, big models 4.")
@click.option("--budget", type=click.Path(path_type=Path), help="Drift budget (TOML); default: the one that ships.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where statistics of activations are taken, for methods that need them.",
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
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
    """Export a checkpoint to a bundle for a device, and measure what quantization cost.

    Exit codes: 0 done; 1 done, but the drift exceeds its budget; 2 bad input; 3 this machine lacks something;
    130 interrupted, nothing is left behind.
    """
    if list_only:
        _list(as_json)
        return
    if target_name is None:
        raise click.UsageError("Missing option '--target'; see export --list", click.get_current_context())
    target = target_named(target_name)
    if checkpoint is None:
        tell("no --checkpoint given: exporting the embedded cobra-mini, a small model of synthetic scenes")
    exported = export_bundle(checkpoint or "mini", target, out, **options)
    if as_json:
        print_json({
            "bundle": str(exported.directory),
            "manifest": exported.manifest,
            "kept_float16": exported.kept_float,
            "drift_verdicts": exported.verdicts,
            "mix": exported.mix,
        })  # fmt: skip
    else:
        for name, reason in exported.kept_float.items():
            say(f"kept in float16: {name} ({reason})")
        if exported.mix is not None:
            mix = exported.mix
            say(f"mix: {mix.bits_per_weight:.3f} bits a weight of the matrices; KLD {mix.kld:.3g} on the calibration data")
        results.print(memory_table(exported.manifest, target))
        results.print(drift_table(exported.manifest, exported.verdicts))
        say(f"bundle: {exported.directory}")
    exceeded = [v.measure for v in exported.verdicts if v.within is False]
    if exceeded:
        raise DriftError(
            f"the drift budget is exceeded by {', '.join(exceeded)}; the bundle is kept for inspection at "
            f"{exported.directory}, do not ship it: take more bits or another method"
        )


def _list(as_json: bool) -> None:
    if as_json:
        print_json(choices())
    else:
        for table in choice_tables():
            results.print(table)


main = main_of(command)

if __name__ == "__main__":
    main()
