"""Measure the sensitivity of a checkpoint's matrices to quantization.

cobra-edge sensitivity --checkpoint mini --rotation out-proj --out sensitivity.json --plot sensitivity.png
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from .environment.memory import keep_freed_memory
from .environment.requirements import require_export
from .errors import MachineError
from .export.answers import answers_file
from .export.checks import check_calibration, check_choices, check_text_only
from .export.guided import calibration_directory
from .export.lines import affordable, check_answerable, drawn_lines
from .export.statistics import expected_sensitivity, find_sensitivity, statistics_for
from .files.staging import check_file_goal, staged_file
from .formats.method import METHODS
from .formats.recipe import FLOAT16, MIXED, ROTATIONS, Recipe
from .formats.scheme import scheme_named
from .inference.session_options import threads_option
from .model.checkpoint_hash import hashed
from .quantize.sensitivity import CANDIDATE_SCHEMES, Sensitivity, write_sensitivity
from .quantize.statistics import read_statistics
from .suite.calibration_lines import read_calibration
from .suite.line_set import LineSet
from .terminal.option_groups import Command, option
from .terminal.output import debug_option, main_of, print_json, results, say, stages

if TYPE_CHECKING:
    from .model.checkpoint import Checkpoint
    from .quantize.calibration_data import EmbeddingCache

_PATH = click.Path(path_type=Path)


@click.command(
    cls=Command, epilog="Example: cobra-edge sensitivity --checkpoint mini --out sensitivity.json --plot sensitivity.png"
)
@option(
    "--checkpoint",
    "source",
    group="input",
    metavar="SOURCE",
    required=True,
    help="mini, cobra+3b (downloaded from the hub) or a directory.",
)
@option(
    "--calibration",
    group="input",
    type=_PATH,
    show_default="as export",
    help="Folder of images, or suite, to measure on, and to collect statistics from if none are given.",
)
@option("--vision-weights", group="input", type=_PATH, help="Directory with the safetensors of the vision encoders.")
@option("--tokenizer", group="input", type=_PATH, help="tokenizer.json or its directory.")
@option("--method", group="quantization", type=click.Choice(list(METHODS)), default="guided", help="Quantization method.")
@option(
    "--rotation",
    group="quantization",
    type=click.Choice(list(ROTATIONS)),
    default="none",
    help="Hadamard rotation, as in export.",
)
@option(
    "--activations",
    group="quantization",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    help="Activations in quantized matmuls.",
)
@option(
    "--clip-activations",
    group="quantization",
    type=click.FloatRange(0, 100, min_open=True),
    help="Clip int8 activations at this percentile of their magnitudes, such as 99.9.",
)
@option("--statistics", group="quantization", type=_PATH, help="File written by `calibrate`, to reuse.")
@option("--out", group="output", type=_PATH, required=True, help="File of the sensitivities, for export --sensitivity.")
@option("--plot", group="output", type=_PATH, help="Plot of the sensitivities, PNG.")
@option("--force", group="output", is_flag=True, help="Replace existing files.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@threads_option
@debug_option
def command(source: str, out: Path, plot: Path | None, force: bool, threads: int | None, as_json: bool, **options: Any) -> None:
    """Tell what each matrix costs in each scheme that fits it: the KLD of a model with that matrix alone quantized.

    With --method guided, costs are foretold from gradients, in two passes over the model. With any other method each is
    measured, which takes a run of the whole model over all lines: minutes for cobra-mini, days for billions of weights.

    Exit codes: 0 done; 2 bad input; 3 this machine lacks something; 130 interrupted.
    """
    for file in filter(None, (out, plot)):
        check_file_goal(file, force=force)
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise MachineError("--plot needs matplotlib; install it with: pip install matplotlib")
    keep_freed_memory()
    with staged_file(out, force=force) as staged:  # opened first: an unwritable file is reported before days of work
        found = _scan(source, out, staged.parent, options)
        write_sensitivity(found, staged)
    shutil.rmtree(calibration_directory(out), ignore_errors=True)
    answers_file(out).unlink(missing_ok=True)
    if plot is not None:
        with staged_file(plot, force=force) as staged:
            draw(found, staged)
    if as_json:
        print_json(found)
    else:
        results.print(_table(found))
        say(f"sensitivities: {out}")


def _scan(source: str, out: Path, stage: Path, options: dict[str, Any]) -> Sensitivity:
    method, rotation, clip = options["method"], options["rotation"], options["clip_activations"]
    check_choices(scheme_named("w4a16-g128"), method, rotation, clip)
    check_calibration(method, clip, options["statistics"], None, otherwise_used=True)
    lines = None if options["calibration"] is None else read_calibration(options["calibration"])
    require_export("sensitivity", "timm", "torch")
    from .model.checkpoint import open_checkpoint
    from .model.vision import check_tower
    from .quantize.calibration_data import EmbeddingCache

    checkpoint = open_checkpoint(source, vision_weights=options["vision_weights"], tokenizer=options["tokenizer"])
    if checkpoint.config.vision is None:
        check_text_only(checkpoint.config.model_id, vision_weights=options["vision_weights"])
    else:
        check_tower(checkpoint.config.vision, checkpoint.vision_weights, checkpoint.tower)
    digest = hashed(checkpoint)
    recipe = Recipe(
        MIXED,
        method,
        {},
        rotations=ROTATIONS[rotation],  # type: ignore[arg-type] # of the table
        activations=options["activations"],
        activation_percentile=clip,
    )
    file = options["statistics"]
    given = None if file is None else read_statistics(file, checkpoint.config, digest)
    cache = EmbeddingCache(checkpoint)
    data = _answered(checkpoint, lines, METHODS[method].needs_gradients, answers_file(out), cache)
    if METHODS[method].needs_gradients:
        return expected_sensitivity(checkpoint, digest, recipe, data, calibration_directory(out), cache)
    with statistics_for(checkpoint, recipe, given, data, stage, cache) as statistics:
        return find_sensitivity(checkpoint, digest, recipe, statistics, data, cache=cache)


def _answered(
    checkpoint: Checkpoint, given: LineSet | None, gradients: bool, kept: Path, cache: EmbeddingCache
) -> LineSet | None:
    """Return the lines to measure on, answered by the float model where they have no answers; None for the embedded sets."""
    from .decode.native_operations import operations_on
    from .model.torch_device import torch_device
    from .quantize.own_answers import Greedy, with_own_answers

    lines = given or drawn_lines(checkpoint.config)
    if lines is None:
        return None
    check_answerable(lines, checkpoint.config)
    device = torch_device("cpu")
    with stages() as on_progress:
        greedy = Greedy(operations_on(device, checkpoint.config.mamba), device, on_progress)
        chosen = affordable(lines, checkpoint.config, gradients=gradients)
        return with_own_answers(checkpoint, chosen, cache, greedy, kept)


def _columns(found: Sensitivity) -> list[str]:
    """Return the measured storages, fewest bits first."""
    return [s for s in (*CANDIDATE_SCHEMES, FLOAT16) if any(s in row for row in found.kld.values())]


def _table(found: Sensitivity) -> Table:
    kind = "expected" if METHODS[found.method].needs_gradients else "mean"
    title = f"{found.model_id}, {found.method}: {kind} KLD (nats) with one matrix quantized, {found.positions} answer tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("matrix")
    for storage in _columns(found):
        table.add_column(storage, justify="right")
    for name, row in found.kld.items():
        table.add_row(_short(name), *(f"{row[s]:.2e}" if s in row else "" for s in _columns(found)))
    return table


def _short(name: str) -> str:
    return name.removeprefix("backbone.").removesuffix(".weight").replace(".mixer.", ".")


def draw(found: Sensitivity, file: Path) -> None:
    """Draw KLD by matrix, one series per scheme, grouped by projection in the order of the layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(found.kld, key=lambda name: name.rpartition(".layers.")[2].partition(".")[2] or name)
    figure, axes = pyplot.subplots(figsize=(max(8, 0.3 * len(names)), 5))
    for storage in _columns(found):
        points = [(i, found.kld[name][storage]) for i, name in enumerate(names) if found.kld[name].get(storage, 0) > 0]
        axes.plot([i for i, _ in points], [kld for _, kld in points], "o", label=storage, alpha=0.8)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=60, ha="right", fontsize="small")
    axes.set(yscale="log", ylabel=f"{'expected' if METHODS[found.method].needs_gradients else 'mean'} KLD from float (nats)")
    axes.set_title(f"{found.model_id}, {found.method}: one matrix quantized, the others float")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


main = main_of(command)

if __name__ == "__main__":
    main()
