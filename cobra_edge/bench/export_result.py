"""The result of `bench export`, and its table."""

from __future__ import annotations

import msgspec

from .machine import Machine
from .tables import Table


class ExportedVision(msgspec.Struct, frozen=True):
    """The vision graph: its precision, and its relative RMS from torch by part."""

    precision: str
    parity: dict[str, float]


class Regressed(msgspec.Struct, frozen=True):
    """A run of `regress` on the golden lines of the exported bundle; time in seconds, memory as of the export.

    Attributes:
        within: whether the bundle drifts as it did at the export.
    """

    lines: int
    images: int
    within: bool
    seconds: float
    peak_gib: float
    own_peak_gib: float


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """`bench export`.

    Attributes:
        quality: of the export.
        scheme: of its recipe.
        seconds: wall time of the command.
        killed: seconds of the processes that were killed and resumed from, by the stage that they were killed in.
        stages: seconds of the last process by stage: of all the work, if none was killed.
        peak_gib: peak resident memory of the command, mapped files included, which the kernel takes back where memory is short.
        own_peak_gib: peak of what no file backs.
        checkpoint_bytes: of the checkpoint that was exported.
        bundle_bytes: by file of the bundle.
        vision: the vision graph.
        regress: the regression harness on the bundle.
    """

    bench: str = "export"
    shape: str
    target: str
    quality: str
    scheme: str
    golden_lines: int
    seconds: float
    killed: dict[str, float]
    stages: dict[str, float]
    peak_gib: float
    own_peak_gib: float
    checkpoint_bytes: int
    bundle_bytes: dict[str, int]
    vision: ExportedVision
    regress: Regressed
    machine: Machine


def export_table(result: ExportResult) -> Table:
    """Return time, memory and sizes of the export, then time and memory of the regression run."""
    m, files, regress = result.machine, result.bundle_bytes, result.regress
    vision_bytes = sum(size for name, size in files.items() if name.startswith("vision"))
    rows = [
        ["machine", f"{m.processor}, {m.cores} cores, {m.memory_gb} GB"],
        ["wall time", f"{result.seconds / 60:.1f} min"],
        *([f"— killed in the stage {stage}, after", f"{seconds / 60:.1f} min"] for stage, seconds in result.killed.items()),
        *([f"— {stage}", f"{seconds / 60:.1f} min"] for stage, seconds in result.stages.items()),
        ["peak memory that no file backs", f"{result.own_peak_gib:.1f} GiB"],
        ["peak resident memory, mapped files included", f"{result.peak_gib:.1f} GiB"],
        ["checkpoint", f"{result.checkpoint_bytes / 1e9:.2f} GB"],
        [f"decoder as {result.scheme}", f"{files['decoder.safetensors'] / 1e9:.2f} GB"],
        [f"vision graph, {result.vision.precision}", f"{vision_bytes / 1e9:.2f} GB"],
        [f"regress on its {regress.lines} golden lines about {regress.images} images", f"{regress.seconds / 60:.1f} min"],
        ["— drift as at the export", "yes" if regress.within else "NO"],
        ["— peak memory that no file backs", f"{regress.own_peak_gib:.1f} GiB"],
        ["— peak resident memory, mapped files included", f"{regress.peak_gib:.1f} GiB"],
    ]
    return Table(["", ""], rows, f"export --quality {result.quality}")
