"""The drift budget of cobra-mini's own builds, and how it is made.

Tests export every build of the table and compare it with export/budgets/cobra-mini.toml; `python -m bench.budgets` updates that
file for review.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.package_data import export_data
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.budget import Budget
from cobra_edge.regress.measures import measure_named
from cobra_edge.regress.outputs.rows import all_figures
from cobra_edge.regress.report import Figure, Report
from cobra_edge.regress.runner import Run, RunResult, measure
from cobra_edge.regress.update_budget import update_budget

BUDGET = export_data("budgets") / "cobra-mini.toml"

# Another instruction set, decoder backend or onnxruntime sums in another order. If all later operations are continuous, the
# figures of the numpy decoder are within 0.01 % of those of the native one. With activations quantized to 8 bits, a value
# halfway between two codes may go to the other one: up to 8 %, and one answer more or less. With calibration, the last bit of
# a sum changes codes and the allocation of bits: another processor or number of threads makes another build, whose few lost
# tokens are not those of the first. Its limits are the worst of several such builds.
CONTINUOUS, ROUNDED, CALIBRATED = 0.01, 0.5, 0.1
CALIBRATION_THREADS = (1, 2, 3, 4)

HEADER = f"""\
# Drift limits of cobra-mini's own builds, on their golden lines compared with the float model, by scheme: tests compare every
# build with them (tests/regress/test_gates.py). Made by `make budgets`: each scheme is exported for the target cpu, rounded to
# nearest (mixed: --bits 4.3 --method guided --rotation out-proj). A limit is the worse end of the interval of a figure plus a
# margin of {CONTINUOUS:.0%}, or {ROUNDED:.0%} if activations are rounded; of mixed the worst end of {len(CALIBRATION_THREADS)}
# builds, calibrated by different numbers of threads, plus {CALIBRATED:.0%}.
#
# To update it after a change that is meant to change answers: make budgets, review the difference (git diff), and give the
# reason for each limit that moved in the commit. A limit that widens without a reason is a bug. This file applies to cobra-mini
# only; for your own model: python -m cobra_edge.regress BUNDLE --update-budget --budget FILE.
"""


@dataclass(frozen=True)
class Gate:
    """A build with drift limits.

    Attributes:
        scheme: name of the section; unique.
        export: keyword arguments of `export_bundle`.
        margin: relative margin above today's drift.
        threads: to calibrate by: a build for each.
    """

    scheme: str
    export: Mapping[str, Any] = field(default_factory=dict)
    margin: float = CONTINUOUS
    threads: tuple[int, ...] = (1,)


def _gate(scheme: str) -> Gate:
    kind = SCHEMES[scheme]
    rounds = kind.activation_bits == 8 or kind.code_format == "int8-rows"
    # On a processor, bitsandbytes takes ten times our time per token.
    lines = {} if kind.code_format == "int" else {"golden_lines": 100}
    return Gate(
        scheme, {"scheme": scheme, "method": "rtn", "vision_precision": "fp32", **lines}, ROUNDED if rounds else CONTINUOUS
    )


GATES = {
    gate.scheme: gate
    for gate in (
        *map(_gate, SCHEMES),
        Gate("mixed", {}, CALIBRATED, CALIBRATION_THREADS),  # the default of a CPU
    )
}


def export_gate(gate: Gate, folder: Path) -> Path:
    """Export the build of a gate and return its directory."""
    return export_bundle("mini", target_named("cpu"), folder / gate.scheme, **gate.export).directory


def measured(bundle: Path, threads: int | None = None, baseline: str = "fp16", budget: Budget | None = None) -> RunResult:
    """Measure a bundle on its golden lines, or on the held-out suite if the baseline is a bundle; judge it by a budget."""
    run = Run(bundle, baseline, None, None, False, "auto", "auto", "auto", DecoderOptions(threads), 0, None)
    return measure(run, budget, None, None)


def write_budget(file: Path, folder: Path, on_gate: Callable[[str, int, int], None]) -> dict[str, Report]:
    """Export and measure the build of every gate, and write the limits; the file is replaced at the end.

    Args:
        file: a budget.
        folder: for bundles.
        on_gate: called with a scheme, the number of finished gates, and the total.

    Returns:
        Reports by scheme.
    """
    reports = {}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.partial-") as stage:
        staged = Path(stage) / file.name
        staged.write_text(HEADER, encoding="utf-8")
        for done, gate in enumerate(GATES.values()):
            on_gate(gate.scheme, done, len(GATES))
            builds = [measured(_export_by(n, gate, folder / str(n))).report for n in gate.threads]
            reports[gate.scheme] = builds[0]
            figures = _worst([all_figures(report) for report in builds])
            update_budget(staged, gate.scheme, figures, builds[0].noise_floor.get("fp16", {}), gate.margin)
        os.chmod(staged, 0o644)
        os.replace(staged, file)
    return reports


def _export_by(threads: int, gate: Gate, folder: Path) -> Path:
    """Export the build of a gate, calibrated by some number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return export_gate(gate, folder)
    finally:
        torch.set_num_threads(before)


def _worst(builds: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Return the figures of the first build with the outermost bounds of all, on both sides of the ideal value.

    On which side a build falls that is rounded otherwise is random.
    """

    def outermost(name: str) -> Figure:
        ideal, figure = measure_named(name).ideal, builds[0][name]
        bounds = [end for build in builds for end in (build[name].low, build[name].high) if end is not None]
        if not bounds:
            return figure
        far = max(abs(end - ideal) for end in bounds)
        return msgspec.structs.replace(figure, low=ideal - far, high=ideal + far)

    return {name: outermost(name) for name in builds[0]}
