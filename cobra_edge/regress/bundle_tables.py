"""Terminal tables of a bundle: drift and memory plan."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.manifest import Drift, Manifest
from ..bundle.reader import DECODER
from ..formats.recipe import OUT_PROJ, RESIDUAL, Recipe
from ..formats.targets import Target
from ..terminal.listing import Listing, Row
from ..terminal.output import megabytes
from .measures import MEASURES, format_value
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
        unjudged, held = any(v.judged is None for v in limits), all(v.within for v in limits)
        word = "" if not limits else "within" if held else "NOT JUDGED" if unjudged else "EXCEEDED"
        value = manifest.drift.measures.get(name, limits[0].judged if limits else None)
        rows.append((name, format_value(name, value), limit, word))
    return rows


def drift_table(manifest: Manifest, verdicts: Sequence[Verdict]) -> Listing:
    """Return the table of the drift from the float model, with its budget."""
    drift = manifest.drift
    where = (
        "not measured"
        if drift is None
        else f"{drift.lines:,} golden lines, {drift.positions:,} answer tokens, {_runtime(drift)}"
    )
    rows = [Row(row, "red" if row[3] in ("EXCEEDED", "NOT JUDGED") else "") for row in drift_rows(manifest, verdicts)]
    title = f"drift of {manifest.recipe.scheme} from the float model ({where})"
    return Listing(title, ("measure", "value", "limit", "verdict"), rows, numbers=(1, 2))


def _runtime(drift: Drift) -> str:
    return drift.runtime if drift.vision_runtime is None else f"{drift.runtime}; vision by {drift.vision_runtime}"


def memory_table(manifest: Manifest, target: Target | None) -> Listing:
    """Return the table of the memory plan; `target` is None if this installation has no profile of it."""
    plan = manifest.memory_plan
    parts = {
        "vision graph": plan.vision_bytes,
        f"decoder, {bits_per_weight(manifest):.2f} bits per weight": plan.decoder_bytes,
        "decoding state, any context length": plan.state_bytes,
        "the decoder's buffers": plan.buffer_bytes or None,
        "working memory": plan.working_bytes,
        "system and runtime": plan.reserved_bytes,
        "total": plan.total_bytes,
        "available": plan.available_bytes,
    }
    rows = [Row((part, megabytes(size)), "bold" if part == "total" else "") for part, size in parts.items() if size is not None]
    return Listing(f"memory on {target.title if target else manifest.target}", ("part", "size"), rows, numbers=(1,))
