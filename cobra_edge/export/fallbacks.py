"""Fallbacks: int8 that no flag asked for is replaced where the drift of the finished bundle exceeds its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec.structs import replace

from ..bundle.manifest import Drift, Manifest
from ..formats.precision import PrecisionName
from ..regress.drift import judged_drift
from ..regress.report import Verdict
from ..terminal.output import tell
from .plan import ExportPlan


@dataclass(frozen=True)
class Measured:
    """A bundle whose drift was measured: its manifest without files and drift, the drift, and the verdict on each limit."""

    draft: Manifest
    drift: Drift
    verdicts: tuple[Verdict, ...]

    def exceeded(self) -> list[str]:
        """Return the measures beyond their limits."""
        return [v.measure for v in self.verdicts if v.within is False]


def measured_within_budget(
    plan: ExportPlan,
    draft: Manifest,
    measure: Callable[[Manifest], Drift],
    with_vision: Callable[[Manifest, PrecisionName], Manifest],
) -> Measured:
    """Measure the drift of a bundle, and where it exceeds the budget that of its fallbacks: float activations, a float graph.

    Args:
        plan: of the export.
        draft: manifest without files and drift.
        measure: returns the drift of the bundle with a manifest.
        with_vision: writes the vision graph again in a precision, and returns the manifest with it.

    Returns:
        The first that is within the budget, or the last: what a flag asked for is never replaced.
    """

    def judged(draft: Manifest) -> Measured:
        drift, precision = measure(draft), None if draft.vision is None else draft.vision.precision
        return Measured(draft, drift, judged_drift(drift, plan.limits(precision), draft.noise_floor))

    found, given = judged(draft), plan.options
    if found.exceeded() and draft.recipe.activations == "int8" and given.activations is None and given.scheme is None:
        tell(f"{', '.join(found.exceeded())}: beyond the drift budget with int8 activations; float32 ones are used instead")
        found = judged(replace(draft, recipe=replace(draft.recipe, activations="float32")))
    if found.exceeded() and plan.precision == "int8" and draft.vision is not None and given.vision_precision is None:
        tell(f"{', '.join(found.exceeded())}: beyond the drift budget with int8 vision; the graph is written in fp32 instead")
        found = judged(with_vision(found.draft, "fp32"))
    return found
