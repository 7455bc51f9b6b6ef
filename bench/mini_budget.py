"""cobra-mini's own drift budget: which builds it is for, and how it is made.

Our tests export every build of the table and hold it against export/budgets/cobra-mini.toml; `python -m bench.budgets`
writes that file anew, for a person to review and commit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.formats.package_data import export_data
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.outputs.rows import all_figures
from cobra_edge.regress.report import Report
from cobra_edge.regress.runner import Run, RunResult, measure
from cobra_edge.regress.update_budget import update_budget

BUDGET = export_data("budgets") / "cobra-mini.toml"

# Another instruction set, decoder backend or onnxruntime adds up in another order. Where every step after that is continuous,
# the numpy decoder's figures lie within 0.01 % of a limit of the native one's. Where activations are rounded to 8 bits, one
# that lies between two codes goes to the other: up to 8 %, and an answer more or less. What gptq and the choice of a mix make
# of the last bit of a sum may be another code, or another mix.
CONTINUOUS, ROUNDED = 0.01, 0.5

HEADER = f"""\
# How far cobra-mini's own builds may drift from the float model on their golden lines, by scheme: what our tests compare every
# build with (tests/regress/test_gates.py). Made by `make budgets`: each scheme is exported for the target cpu, rounded to
# nearest (mixed: --bits 4.3 --method gptq --rotation both), and its figures are written here, the worse end of each interval plus
# a margin of {CONTINUOUS:.0%}, of {ROUNDED:.0%} where activations are rounded or codes depend on statistics.
#
# To renew it after a change that is meant to move answers: make budgets, read the difference (git diff), and say in the commit
# why each limit moved. A limit that became wider without a reason is the finding, not the remedy. This file is of cobra-mini
# and of nothing else; a model of your own needs its own: python -m cobra_edge.regress BUNDLE --update-budget --budget FILE.
"""


@dataclass(frozen=True)
class Gate:
    """A build that has limits.

    Attributes:
        scheme: the section's name; unique.
        export: keyword arguments of `export_bundle`.
        margin: how much more drift than today's is allowed.
    """

    scheme: str
    export: Mapping[str, Any] = field(default_factory=dict)
    margin: float = CONTINUOUS


def _gate(scheme: str) -> Gate:
    kind = SCHEMES[scheme]
    rounds = kind.activation_bits == 8 or kind.code_format == "int8-rows"
    # bitsandbytes needs ten times our time a token on a processor.
    lines = {} if kind.code_format == "int" else {"golden_lines": 100}
    return Gate(scheme, {"scheme": scheme, **lines}, ROUNDED if rounds else CONTINUOUS)


GATES = {
    gate.scheme: gate
    for gate in (
        *map(_gate, SCHEMES),
        Gate("mixed", {"activations": "float32", "bits": 4.3, "method": "gptq", "rotation": "both"}, ROUNDED),
    )
}


def export_gate(gate: Gate, folder: Path) -> Path:
    """Export a gate's build as an engineer would, and return its directory."""
    return export_bundle("mini", target_named("cpu"), folder / gate.scheme, **gate.export).directory


def measured(bundle: Path, threads: int | None = None, baseline: str = "fp16") -> RunResult:
    """Ask a bundle its golden lines, or where the baseline is another bundle the held-out suite; nothing is judged."""
    run = Run(bundle, baseline, None, None, False, "auto", "auto", "auto", DecoderOptions(threads), 0, None)
    return measure(run, None, None, None)


def write_budget(file: Path, folder: Path, on_gate: Callable[[str, int, int], None]) -> dict[str, Report]:
    """Export and measure every gate's build and write the limits of all; the file is replaced when the last one is done.

    Args:
        file: a budget.
        folder: where bundles may be put.
        on_gate: told a scheme, how many are done, and of how many.

    Returns:
        What was measured, by scheme.
    """
    reports = {}
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.partial-") as stage:
        staged = Path(stage) / file.name
        staged.write_text(HEADER, encoding="utf-8")
        for done, gate in enumerate(GATES.values()):
            on_gate(gate.scheme, done, len(GATES))
            report = reports[gate.scheme] = measured(export_gate(gate, folder)).report
            update_budget(staged, gate.scheme, all_figures(report), report.noise_floor.get("fp16", {}), gate.margin)
        os.chmod(staged, 0o644)
        os.replace(staged, file)
    return reports
