"""A random checkpoint of a published shape, exported as a user would: by the command, in a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..environment.requirements import install_hint
from ..errors import MachineError
from .machine import Finished, measure


@dataclass(frozen=True)
class RandomExport:
    """What was made.

    Attributes:
        done: the command's own time and peak memory.
        manifest: the bundle's.
        checkpoint_bytes: of what it was made from.
    """

    done: Finished
    manifest: dict[str, Any]
    checkpoint_bytes: int


def export_random(
    shape: str, target: str, scheme: str, golden_lines: int, folder: Path, out: Path, bar: Progress
) -> RandomExport:
    """Write a random checkpoint into a folder and export it; random weights have no drift limits.

    Args:
        shape, target, scheme: by name, known.
        golden_lines: how many.
        folder: an existing one, for the checkpoint; three times the size of the bundle, which the caller takes away.
        out: the bundle's directory.
        bar: for progress.

    Raises:
        MachineError: a library is missing, or the export failed.
    """
    try:
        from .random_checkpoint import write_random_checkpoint
    except ImportError as error:
        raise MachineError(f"bench export needs {error.name}; install it with: {install_hint('export')}") from error

    source, no_limits = folder / shape, folder / "budget.toml"
    task = bar.add_task(f"random {shape}", total=3)
    write_random_checkpoint(shape, source, lambda: bar.advance(task))
    no_limits.write_text(f"[schemes.{scheme}]\n", encoding="utf-8")
    arguments = ["--target", target, "--checkpoint", str(source), "--scheme", scheme, "--out", str(out)]
    arguments += ["--golden-lines", str(golden_lines), "--budget", str(no_limits), "--json"]
    done = measure(["cobra_edge.export", *arguments])
    if done.exit_code:
        raise MachineError(f"the export ended with exit code {done.exit_code}; see its messages above")
    checkpoint_bytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    return RandomExport(done, json.loads(done.stdout)["manifest"], checkpoint_bytes)
