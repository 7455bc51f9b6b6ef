"""A checkpoint with random weights in a published shape, exported by the real command in a child process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..environment.requirements import install_hint
from ..errors import MachineError
from ..formats.recipe import MIXED
from ..formats.scheme import SCHEMES
from .machine import Finished, measure


@dataclass(frozen=True)
class RandomExport:
    """An export.

    Attributes:
        process: exit code, time and peak memory of the command.
        stages: seconds by stage.
        manifest: of the bundle.
        checkpoint_bytes: of the checkpoint.
    """

    process: Finished
    stages: dict[str, float]
    manifest: dict[str, Any]
    checkpoint_bytes: int


def export_random(
    shape: str, target: str, recipe: list[str], golden_lines: int, folder: Path, out: Path, bar: Progress
) -> RandomExport:
    """Write a random checkpoint into a folder and export it, without drift limits.

    Args:
        shape, target: valid names.
        recipe: options of the export, such as --scheme and a name.
        golden_lines: their number.
        folder: an existing one, for the checkpoint; about three times the size of the bundle. The caller deletes it.
        out: directory of the bundle.
        bar: for progress.

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
    arguments += ["--golden-lines", str(golden_lines), "--budget", str(budget_without_limits(folder)), "--json"]
    done = measure(["cobra_edge.export", *arguments])
    if done.exit_code:
        raise MachineError(f"the export failed with exit code {done.exit_code}; see its messages above")
    checkpoint_bytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    said = json.loads(done.stdout)
    return RandomExport(done, said["seconds"], said["manifest"], checkpoint_bytes)


def budget_without_limits(folder: Path) -> Path:
    """Write a drift budget that allows everything, for exports whose drift is the result; return the file."""
    budget = folder / "budget.toml"
    budget.write_text("".join(f'[schemes."{name}"]\n' for name in (*SCHEMES, MIXED)), encoding="utf-8")
    return budget
