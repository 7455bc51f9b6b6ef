"""A checkpoint with random weights in a published shape, exported and regressed by the real commands in child processes."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..environment.requirements import install_hint
from ..errors import MachineError
from ..export.guided import calibration_directory
from ..formats.recipe import MIXED
from ..formats.scheme import SCHEMES
from .machine import Finished, measure

# What exists beside the bundle once the first layer of a stage is finished: an export that is killed then resumes from it.
_FIRST_LAYERS = {
    "calibration, forward": "gradients/last-1.f32",
    "calibration, gradients": "gradients/part-1.safetensors",
    "quantization": "quantized/part-1.safetensors",
}


@dataclass(frozen=True)
class RandomExport:
    """An export.

    Attributes:
        process: exit code of the last process; time and peak memory of all.
        killed: seconds until the process was killed, by the stage that it was killed in.
        stages: seconds by stage.
        manifest: of the bundle.
        checkpoint_bytes: of the checkpoint.
    """

    process: Finished
    killed: dict[str, float]
    stages: dict[str, float]
    manifest: dict[str, Any]
    checkpoint_bytes: int


def export_random(
    shape: str,
    target: str,
    recipe: list[str],
    folder: Path,
    out: Path,
    bar: Progress,
    interrupt: bool = False,
) -> RandomExport:
    """Write a random checkpoint into a folder and export it, without drift limits.

    Args:
        shape, target: valid names.
        recipe: options of the export, such as --scheme and a name.
        folder: an existing one, for the checkpoint; about three times the size of the bundle. The caller deletes it.
        out: directory of the bundle.
        bar: for progress.
        interrupt: whether to kill the export once in each stage of a guided calibration, and start it again.

    Raises:
        MachineError: a library is missing, or the export failed.
    """
    try:
        from .random_checkpoint import write_random_checkpoint
    except ImportError as error:
        raise MachineError(f"bench export needs {error.name}; install it with: {install_hint('export')}") from error

    source = folder / shape
    task = bar.add_task(f"random {shape}", total=3)
    write_random_checkpoint(shape, source, lambda: bar.advance(task))
    arguments = ["--target", target, "--checkpoint", str(source), *recipe, "--out", str(out)]
    arguments += ["--budget", str(budget_without_limits(folder)), "--json"]
    done, killed = _measured(arguments, calibration_directory(out), _FIRST_LAYERS if interrupt else {})
    if done.exit_code:
        raise MachineError(f"the export failed with exit code {done.exit_code}; see its messages above")
    checkpoint_bytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    said = json.loads(done.stdout)
    return RandomExport(done, killed, said["seconds"], said["manifest"], checkpoint_bytes)


def _measured(arguments: list[str], calibration: Path, kill_at: dict[str, str]) -> tuple[Finished, dict[str, float]]:
    killed: dict[str, float] = {}
    peak = own = 0
    for stage, file in kill_at.items():
        done = measure(["cobra_edge.export", *arguments], kill=(calibration / file).is_file)
        if done.exit_code != -signal.SIGKILL:
            raise MachineError(f"the export ended with exit code {done.exit_code} before it could be killed in: {stage}")
        killed[stage], peak, own = done.seconds, max(peak, done.peak_bytes), max(own, done.own_peak_bytes)
    done = measure(["cobra_edge.export", *arguments])
    peak, own = max(peak, done.peak_bytes), max(own, done.own_peak_bytes)
    return replace(done, seconds=done.seconds + sum(killed.values()), peak_bytes=peak, own_peak_bytes=own), killed


def regress_random(bundle: Path, folder: Path) -> tuple[Finished, dict[str, Any]]:
    """Run the regression harness on an exported bundle and its golden lines, without drift limits; return the report too.

    What is left to judge is whether the bundle drifts as it did at the export: exit code 1 if not.

    Raises:
        MachineError: the run failed.
    """
    done = measure(["cobra_edge.regress", str(bundle), "--budget", str(budget_without_limits(folder)), "--json"])
    if done.exit_code not in (0, 1):
        raise MachineError(f"regress failed with exit code {done.exit_code}; see its messages above")
    return done, json.loads(done.stdout)


def budget_without_limits(folder: Path) -> Path:
    """Write a drift budget that allows everything, for exports whose drift is the result; return the file."""
    budget = folder / "budget.toml"
    budget.write_text("".join(f'[schemes."{name}"]\n' for name in (*SCHEMES, MIXED)), encoding="utf-8")
    return budget
