"""Answers of the float model within an export, to calibration and golden lines that have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..terminal.output import stages
from .checks import reads_lines
from .plan import ExportPlan

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache


def with_answers(checkpoint: Any, plan: ExportPlan, cache: EmbeddingCache) -> ExportPlan:
    """Return the plan with every answer that the export needs.

    Finished answers are kept in a hidden file next to the bundle's directory; see `answers_file`.

    Args:
        checkpoint: opened.
        plan: whose calibration and golden lines, if both lack answers, are of one set without a common image.
        cache: visual embeddings that other steps share.

    Raises:
        InputError: as `with_own_answers`, or no answer is left to calibrate on or to measure drift on.
    """
    lines, golden = plan.calibration, plan.golden
    if lines is None or not any(not line.answer for line in [*lines.lines, *golden.lines]):
        return plan
    from ..decode.native_operations import operations_on
    from ..model.torch_device import torch_device
    from ..quantize.own_answers import Greedy, with_own_answers

    device = torch_device(plan.options.device)
    own_golden = any(not line.answer for line in golden.lines)
    asked = [*(lines.lines if _reads_lines(plan) else []), *(golden.lines if own_golden else [])]
    kept = answers_file(plan.directory)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with stages() as on_progress:
        greedy = Greedy(operations_on(device, checkpoint.config.mamba), device, on_progress)
        found = with_own_answers(checkpoint, replace(lines, lines=asked), cache, greedy, kept)
    held_out = {line.image for line in golden.lines} if own_golden else set()
    parts = [replace(lines, lines=[line for line in found.lines if (line.image in held_out) is side]) for side in (False, True)]
    for needed, part, use in (
        (_reads_lines(plan), parts[0], "to calibrate on"),
        (own_golden, parts[1], "held out to measure drift on"),
    ):
        if needed and not part.lines:
            raise InputError(
                f"{lines.name}: the float model's answers to all lines {use} are empty; add images, or give answers"
            )
    return replace(plan, calibration=parts[0] if _reads_lines(plan) else lines, golden=parts[1] if own_golden else golden)


def answers_file(bundle: Path) -> Path:
    """Return the file of finished answers, which an interrupted export leaves and a finished one removes."""
    return bundle.absolute().parent / f".{bundle.name}.answers.json"


def _reads_lines(plan: ExportPlan) -> bool:
    recipe = plan.recipe
    return reads_lines(recipe.method, plan.choice.bits, recipe.activation_percentile, plan.statistics)
