"""Calibration within an export: statistics, sensitivities and bit allocation, from files or computed now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.staging import scratch_directory
from ..formats.recipe import Recipe
from ..quantize.bit_allocation import BitAllocation, allocate_bits
from ..quantize.sensitivity import SCHEMA_VERSION, Sensitivity, Table, of_tensors, passes, scan
from ..quantize.statistics import Statistics
from ..suite.line_set import LineSet
from ..terminal.output import progress, stages, tell
from ..version import __version__
from .checks import needs_statistics
from .guided import guided
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache


@contextmanager
def statistics_for(
    checkpoint: Any,
    recipe: Recipe,
    given: Statistics | None,
    data: LineSet | None,
    stage: Path,
    cache: EmbeddingCache | None = None,
    device: str = "cpu",
    watch: Stopwatch | None = None,
) -> Iterator[Statistics | None]:
    """Yield the statistics that a recipe needs: those given, or new ones; None if it needs none.

    Args:
        checkpoint: opened.
        recipe: with the method and clipping.
        given: statistics from a file, or None.
        data: calibration lines for new statistics, with answers; None for the embedded set.
        stage: directory that holds new statistics while they are in use.
        cache: visual embeddings that other steps share.
        device: "cpu" or "cuda": where new statistics are collected.
        watch: receives the time that they take.

    Raises:
        InputError: what `collect_statistics` raises.
        MachineError: "cuda" was requested, and torch cannot use a GPU here.
    """
    if given is not None or not needs_statistics(recipe.method, recipe.activation_percentile):
        yield given
        return
    from ..decode.native_operations import operations_on
    from ..model.torch_device import torch_device
    from ..quantize.calibration import collect_statistics

    if data is None:
        tell("no --statistics given: collecting them from the embedded calibration set of synthetic scenes")
    data, runs_on = data or LineSet.embedded(), torch_device(device)
    with scratch_directory(stage / "statistics") as scratch:
        with (watch or Stopwatch()).stage("calibration"), stages() as on_progress:
            found = collect_statistics(
                checkpoint,
                data.lines,
                data.directory,
                resume_directory=scratch,
                operations=operations_on(runs_on, checkpoint.config.mamba),
                device=runs_on,
                on_progress=on_progress,
                cache=cache,
            )
        yield found


def _evaluation(
    checkpoint: Any, recipe: Recipe, statistics: Statistics | None, data: LineSet | None, cache: EmbeddingCache | None
) -> Any:
    from ..regress.recipe_eval import RecipeEvaluation

    data = data or LineSet.embedded()
    with stages() as stage:
        return RecipeEvaluation(checkpoint, recipe, statistics, data.lines, data.directory, stage, cache)


def find_sensitivity(
    checkpoint: Any,
    digest: str,
    recipe: Recipe,
    statistics: Statistics | None,
    data: LineSet | None,
    *,
    cache: EmbeddingCache | None = None,
    evaluation: Any = None,
) -> Sensitivity:
    """Measure the sensitivity of every matrix of a checkpoint.

    Args:
        checkpoint: opened.
        digest: hash of the checkpoint.
        recipe: method, rotations and activations.
        statistics: of the checkpoint, if the recipe needs them.
        data: lines to measure on, with answers; None for the embedded calibration set.
        cache: visual embeddings that other steps share.
        evaluation: a `RecipeEvaluation` of the same arguments, to reuse.

    Raises:
        InputError: as `RecipeEvaluation` and `scan`.
    """
    config = checkpoint.config.mamba
    evaluation = evaluation or _evaluation(checkpoint, recipe, statistics, data, cache)
    with progress() as bar:
        task = bar.add_task(f"sensitivity, {passes(config)} passes", total=passes(config))
        table = scan(config, recipe, evaluation.kld, lambda: bar.advance(task))
    return _sensitivity(checkpoint, digest, recipe, evaluation.lines, evaluation.positions, table)


def expected_sensitivity(
    checkpoint: Any, digest: str, recipe: Recipe, data: LineSet | None, work: Path, cache: EmbeddingCache
) -> Sensitivity:
    """Return the costs that gradients foretell, in place of a scan.

    Args:
        checkpoint, digest, data, cache: as for `find_sensitivity`.
        recipe: method and rotations.
        work: hidden directory that an interrupted calibration resumes from.

    Raises:
        InputError, MachineError: as `guided`.
    """
    with guided(checkpoint, recipe, data, work, cache, Stopwatch()) as found:
        costs = found.guidance.costs()
        return _sensitivity(checkpoint, digest, recipe, found.header.lines, found.header.answers, costs)


def _sensitivity(checkpoint: Any, digest: str, recipe: Recipe, lines: int, positions: int, kld: Table) -> Sensitivity:
    return Sensitivity(
        schema_version=SCHEMA_VERSION,
        cobra_edge=__version__,
        model_id=checkpoint.config.model_id,
        model_sha256=digest,
        method=recipe.method,
        rotations=recipe.rotations,
        activations=recipe.activations,
        activation_percentile=recipe.activation_percentile,
        lines=lines,
        positions=positions,
        kld=kld,
    )


def find_allocation(
    checkpoint: Any,
    digest: str,
    recipe: Recipe,
    statistics: Statistics | None,
    data: LineSet | None,
    bits_per_weight: float,
    known: Sensitivity | None,
    cache: EmbeddingCache | None = None,
) -> tuple[Recipe, BitAllocation]:
    """Allocate bits within a budget; return the recipe with the allocated schemes, and the allocation.

    Args:
        checkpoint, digest, recipe, statistics, data, cache: as for `find_sensitivity`.
        bits_per_weight: budget, as `recipe.matrix_bits` counts.
        known: sensitivities from a file; None measures them now.

    Raises:
        InputError: as `find_sensitivity` and `allocate_bits`.
    """
    config = checkpoint.config.mamba
    evaluation = _evaluation(checkpoint, recipe, statistics, data, cache)
    found = known or find_sensitivity(checkpoint, digest, recipe, statistics, data, evaluation=evaluation)
    with stages() as on_step:
        allocation = allocate_bits(
            config, recipe, found.kld, bits_per_weight, evaluation.kld, lambda done, total: on_step("allocations", done, total)
        )
    return of_tensors(recipe, allocation.tensors), allocation
