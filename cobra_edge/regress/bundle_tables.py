"""Terminal tables of a bundle: drift and memory plan."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ..bundle.manifest import Drift, Manifest
from ..bundle.reader import DECODER
from ..formats.recipe import OUT_PROJ, RESIDUAL, Recipe
from ..formats.targets import Target
from ..terminal.output import cell, megabytes
from .measures import MEASURES, format_value, measure_named
from .report import Verdict


def describe_rotations(recipe: Recipe) -> str:
    """Return the rotations in words, to follow scheme and method; empty without rotations."""
    words = {RESIDUAL: "residual stream", OUT_PROJ: "out_proj"}
    rotated = " and ".join(words[r] for r in recipe.rotations)
    matrices = "a Hadamard matrix" if len(recipe.rotations) == 1 else "Hadamard matrices"
    return f", {rotated} rotated by {matrices}" if rotated else ""


def recipe_line(manifest: Manifest) -> str:
    """Return the recipe in a line: scheme, method, rotations, activations, and the precision of the vision graph."""
    recipe = manifest.recipe
    vision = "" if manifest.vision is None else f", {manifest.vision.precision} vision"
    return f"{recipe.scheme}, {recipe.method}{describe_rotations(recipe)}, {recipe.activations} activations{vision}"


def bits_per_weight(manifest: Manifest) -> float:
    """Return the bits per decoder weight in the file, including scales and float tensors."""
    return manifest.files[DECODER].bytes * 8 / manifest.model.mamba.n_parameters


def drift_rows(manifest: Manifest, verdicts: Sequence[Verdict]) -> list[tuple[str, str, str, str]]:
    """Return (measure, value, limit, verdict) of each measure, those of tasks and layers if limited; none without drift."""
    if manifest.drift is None:
        return []
    rows = []
    for name in dict.fromkeys((*MEASURES, *(v.measure for v in verdicts))):
        limits = [v for v in verdicts if v.measure == name]
        if name not in manifest.drift.measures and not limits:
            continue
        limit = ", ".join(format_value(name, v.limit) for v in limits)
        word = "" if not limits else "within" if all(v.within for v in limits) else "EXCEEDED"
        rows.append((measure_named(name).label, format_value(name, manifest.drift.measures.get(name)), limit, word))
    return rows


def drift_table(manifest: Manifest, verdicts: Sequence[Verdict]) -> Table:
    """Return the table of the drift from the float model, with its budget."""
    drift = manifest.drift
    where = (
        "not measured"
        if drift is None
        else f"{drift.lines:,} golden lines, {drift.positions:,} answer tokens, {_runtime(drift)}"
    )
    title = cell(f"drift of {manifest.recipe.scheme} from the float model ({where})")
    table = Table(title=title, title_justify="left")
    table.add_column("measure")
    for column in ("value", "limit", ""):
        table.add_column(column, justify="right")
    for row in drift_rows(manifest, verdicts):
        table.add_row(*row, style="red" if row[3] == "EXCEEDED" else None)
    return table


def _runtime(drift: Drift) -> str:
    return drift.runtime if drift.vision_runtime is None else f"{drift.runtime}; vision by {drift.vision_runtime}"


def memory_table(manifest: Manifest, target: Target | None) -> Table:
    """Return the table of the memory plan; `target` is None if this installation has no profile of it."""
    plan = manifest.memory_plan
    table = Table(title=cell(f"memory on {target.title if target else manifest.target}"), title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_row("vision graph", megabytes(plan.vision_bytes))
    table.add_row(f"decoder, {bits_per_weight(manifest):.2f} bits per weight", megabytes(plan.decoder_bytes))
    table.add_row("decoding state, any context length", megabytes(plan.state_bytes))
    if plan.buffer_bytes:
        table.add_row("the decoder's buffers", megabytes(plan.buffer_bytes))
    table.add_row("working memory", megabytes(plan.working_bytes))
    table.add_row("system and runtime", megabytes(plan.reserved_bytes))
    table.add_row("total", megabytes(plan.total_bytes), style="bold")
    if plan.available_bytes is not None:
        table.add_row("available", megabytes(plan.available_bytes))
    return table
