"""Statistics for whoever needs them: from a file, or taken now; and the drift that a mix of schemes is chosen by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .quantize.mix import Mix, choose_mix
from .quantize.sensitivity import SCHEMA_VERSION, Sensitivity, of_tensors, passes, read_sensitivity, scan
from .quantize.statistics import Statistics
from .recipe import Recipe
from .regress.suite import CALIBRATION, read_suite
from .staging import scratch_directory
from .terminal import progress, stages, tell
from .version import __version__


def hashed(checkpoint: Any) -> str:
    """Return a checkpoint's hash, with a bar."""
    with progress() as bar:
        source_mib = sum(f.stat().st_size for f in checkpoint.hashed_files()) / 2**20
        task = bar.add_task("hash the checkpoint, MiB", total=source_mib)
        digest: str = checkpoint.sha256(lambda n: bar.advance(task, n / 2**20))
    return digest


@contextmanager
def statistics_for(
    checkpoint: Any, digest: str, recipe: Recipe, file: Path | None, data: Path | None, beside: Path
) -> Iterator[Statistics | None]:
    """Give the statistics that the recipe needs: from the file, or taken now; None where it needs none.

    Args:
        checkpoint: an opened one.
        digest: its hash.
        recipe: whose method and clipping ask for them.
        file: of statistics, or None.
        data: suite that they are taken of where there is no file; by default the embedded one.
        beside: a path beside which they lie while they are in use.

    Raises:
        InputError: what `read_statistics` and `collect_statistics` raise.
    """
    needed = recipe.method not in ("none", "rtn") or recipe.activation_percentile is not None
    if file is None and not needed:
        yield None
        return
    from .decode.native_operations import best_operations
    from .quantize.calibration import collect_statistics
    from .quantize.statistics import read_statistics

    if file is not None:
        given = read_statistics(file, checkpoint.config, digest)
        yield given if needed else None
        return
    if data is None:
        tell("no --statistics given: taking them of the embedded calibration set, pictures of synthetic scenes")
    data = data or CALIBRATION
    with scratch_directory(beside, "statistics") as scratch:
        with stages() as stage:
            found = collect_statistics(
                checkpoint,
                read_suite(data),
                data.parent,
                partial=scratch,
                operations=best_operations(),
                on_progress=stage,
            )
        yield found


def _trial(checkpoint: Any, recipe: Recipe, statistics: Statistics | None, data: Path | None) -> Any:
    from .regress.trial import Trial

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
    sensitivity: Path | None,
) -> tuple[Recipe, Mix]:
    """Find the best mix of schemes within a budget, and return the recipe with its tensors.

    Args:
        checkpoint, digest, recipe, statistics, data: as for `find_sensitivity`.
        bits_per_weight: the budget, as `recipe.matrix_bits` counts.
        sensitivity: file of a scan; None scans now.

    Raises:
        InputError: what `read_sensitivity`, `find_sensitivity` and `choose_mix` raise.
    """
    config = checkpoint.config.mamba
    known = None if sensitivity is None else read_sensitivity(sensitivity, config, digest, recipe)
    trial = _trial(checkpoint, recipe, statistics, data)
    found = known or find_sensitivity(checkpoint, digest, recipe, statistics, data, trial)
    with stages() as stage:
        mix = choose_mix(
            config, recipe, found.kld, bits_per_weight, trial.kld, lambda done, total: stage("mixes measured", done, total)
        )
    return of_tensors(recipe, mix.tensors), mix
