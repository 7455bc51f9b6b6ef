"""Statistics for whoever needs them: from a file, or taken now; and the drift that a mix of schemes is chosen by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.staging import scratch_directory
from ..formats.recipe import Recipe
from ..quantize.bit_allocation import Mix, choose_mix
from ..quantize.sensitivity import SCHEMA_VERSION, Sensitivity, of_tensors, passes, scan
from ..quantize.statistics import Statistics
from ..suite.reader import CALIBRATION, read_suite
from ..terminal.output import progress, stages, tell
from ..version import __version__
from .checks import needs_statistics


@contextmanager
def statistics_for(
    checkpoint: Any, recipe: Recipe, given: Statistics | None, data: Path | None, stage: Path, device: str = "cpu"
) -> Iterator[Statistics | None]:
    """Give the statistics that the recipe needs: those given, or some taken now; None where it needs none.

    Args:
        checkpoint: an opened one.
        recipe: whose method and clipping ask for them.
        given: what was read from a file, or None.
        data: suite that they are taken of where none are given; by default the embedded one.
        stage: a directory in which they lie while they are in use.
        device: "cpu" or "cuda": where they are taken.

    Raises:
        InputError: what `collect_statistics` raises. MachineError: torch can use no GPU here, and one was asked for.
    """
    if given is not None or not needs_statistics(recipe.method, recipe.activation_percentile):
        yield given
        return
    from ..decode.native_operations import operations_on
    from ..model.torch_device import torch_device
    from ..quantize.calibration import collect_statistics

    if data is None:
        tell("no --statistics given: taking them of the embedded calibration set, pictures of synthetic scenes")
    data, there = data or CALIBRATION, torch_device(device)
    with scratch_directory(stage / "statistics") as scratch:
        with stages() as on_stage:
            found = collect_statistics(
                checkpoint,
                read_suite(data),
                data.parent,
                partial=scratch,
                operations=operations_on(there, checkpoint.config.mamba),
                device=there,
                on_progress=on_stage,
            )
        yield found


def _trial(checkpoint: Any, recipe: Recipe, statistics: Statistics | None, data: Path | None) -> Any:
    from ..regress.recipe_eval import Trial

    data = data or CALIBRATION
    with stages() as stage:
        return Trial(checkpoint, recipe, statistics, read_suite(data), data.parent, stage)


def find_sensitivity(
    checkpoint: Any, digest: str, recipe: Recipe, statistics: Statistics | None, data: Path | None, trial: Any = None
) -> Sensitivity:
    """Scan a checkpoint.

    Args:
        checkpoint: an opened one.
        digest: its hash.
        recipe: method, rotations and activations.
        statistics: of the checkpoint, where the recipe needs them.
        data: suite of the questions; by default the embedded one.
        trial: of these, where it is there already.

    Raises:
        InputError: what `Trial` and `scan` raise.
    """
    config = checkpoint.config.mamba
    trial = trial or _trial(checkpoint, recipe, statistics, data)
    with progress() as bar:
        task = bar.add_task(f"sensitivity, {passes(config)} passes", total=passes(config))
        table = scan(config, recipe, trial.kld, lambda: bar.advance(task))
    return Sensitivity(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        model_id=checkpoint.config.model_id,
        model_sha256=digest,
        method=recipe.method,
        rotations=recipe.rotations,
        activations=recipe.activations,
        activation_percentile=recipe.activation_percentile,
        lines=trial.lines,
        positions=trial.positions,
        kld=table,
    )


def find_mix(
    checkpoint: Any,
    digest: str,
    recipe: Recipe,
    statistics: Statistics | None,
    data: Path | None,
    bits_per_weight: float,
    known: Sensitivity | None,
) -> tuple[Recipe, Mix]:
    """Find the best mix of schemes within a budget, and return the recipe with its tensors.

    Args:
        checkpoint, digest, recipe, statistics, data: as for `find_sensitivity`.
        bits_per_weight: the budget, as `recipe.matrix_bits` counts.
        known: what a scan found; None scans now.

    Raises:
        InputError: what `find_sensitivity` and `choose_mix` raise.
    """
    config = checkpoint.config.mamba
    trial = _trial(checkpoint, recipe, statistics, data)
    found = known or find_sensitivity(checkpoint, digest, recipe, statistics, data, trial)
    with stages() as stage:
        mix = choose_mix(
            config, recipe, found.kld, bits_per_weight, trial.kld, lambda done, total: stage("mixes measured", done, total)
        )
    return of_tensors(recipe, mix.tensors), mix
