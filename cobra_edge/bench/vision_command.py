"""`bench vision`: the vision graph in each precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..formats.precision import PRECISIONS
from ..formats.targets import target_named
from ..terminal.option_groups import Command, option
from ..terminal.output import debug_option, print_json, tell
from .results import check_name, save_result
from .shapes import shape_named
from .tables import print_result
from .vision_result import VisionResult, vision_tables

Extra = TypeVar("Extra")


@dataclass(frozen=True)
class VisionPlan:
    """What is measured.

    Attributes:
        shape: "cobra-mini" or a published shape.
        precisions: of the graph; all if empty.
        engines: precisions for which a TensorRT for RTX engine is built.
        target: that engines are built for.
        rounds: of latency.
        scratch: where graphs are written.
    """

    shape: str
    precisions: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    target: str = "rtx-4090"
    rounds: int = 7
    scratch: Path | None = None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The precisions that are measured."""
        return self.precisions or tuple(PRECISIONS)

    def check(self) -> None:
        """Raise InputError for an invalid value, MachineError if a library is missing."""
        shape_named(self.shape), target_named(self.target)
        if unknown := sorted(set(self.engines) - set(self.chosen)):
            raise InputError(f"--engine {', '.join(unknown)}: this precision is not measured; add it to --precision")
        try:
            import torch  # noqa: F401 - only whether it is installed
        except ImportError as error:
            raise MachineError(f"bench vision needs {error.name}; install it with: {install_hint('export')}") from error
        if self.engines:
            from ..vision.engines.tensorrt_rtx import require_tensorrt_rtx

            require_tensorrt_rtx()


@click.command(cls=Command, epilog="Example: cobra-edge bench vision --precision fp32 --precision int8")
@option("--shape", group="input", default="cobra-mini", help="cobra-mini, or a published shape with random weights.")
@option(
    "--precision",
    "precisions",
    group="quantization",
    multiple=True,
    type=click.Choice(list(PRECISIONS)),
    help="Measure only this precision; repeatable.  [default: all]",
)
@option(
    "--engine",
    "engines",
    group="quantization",
    multiple=True,
    type=click.Choice(list(PRECISIONS)),
    help="Also build a TensorRT for RTX engine of this precision; repeatable.",
)
@option("--target", group="quantization", default="rtx-4090", help="Device profile that engines are built for.")
@option("--rounds", group="measurement", type=click.IntRange(1), default=7, help="Rounds of latency.")
@option("--name", group="output", help="Name of the file in bench/results.  [default: vision-SHAPE]")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of a table.")
@option("--scratch", group="advanced", type=click.Path(path_type=Path, exists=True), help="Directory for temporary files.")
@debug_option
def vision(
    shape: str,
    precisions: tuple[str, ...],
    engines: tuple[str, ...],
    target: str,
    rounds: int,
    scratch: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Measure the vision graph in each precision: latency, peak memory, size, distance from torch; build engines."""
    plan = VisionPlan(shape, precisions, engines, target, rounds, scratch)
    check_name(name or f"vision-{shape}")
    plan.check()
    result, _ = measure(plan, lambda _graphs: None)
    file = save_result(name or f"vision-{shape}", result)
    if as_json:
        print_json(result)
    else:
        print_result(vision_tables(result), file)


def measure(plan: VisionPlan, evaluate: Callable[[list[Path]], Extra]) -> tuple[VisionResult, Extra]:
    """Measure the graphs.

    Args:
        plan: already checked.
        evaluate: called with the directories of the graphs before they are deleted.

    Returns:
        The result, and what `evaluate` returned.
    """
    from .machine import machine
    from .vision import measure_vision

    with tempfile.TemporaryDirectory(dir=plan.scratch) as folder:
        found = measure_vision(plan.shape, plan.chosen, plan.engines, plan.target, plan.rounds, Path(folder), tell)
        extra = evaluate([Path(folder) / precision for precision in plan.chosen])
    return VisionResult(**msgspec.structs.asdict(found), machine=machine()), extra
