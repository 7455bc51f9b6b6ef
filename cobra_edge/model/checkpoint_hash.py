"""The hash of a checkpoint, with a progress bar."""

from __future__ import annotations

from typing import Any

from ..terminal.output import progress


def hashed(checkpoint: Any) -> str:
    """Return a checkpoint's hash, showing a progress bar."""
    with progress() as bar:
        source_mib = sum(f.stat().st_size for f in checkpoint.hashed_files()) / 2**20
        task = bar.add_task("hash the checkpoint, MiB", total=source_mib)
        digest: str = checkpoint.sha256(lambda n: bar.advance(task, n / 2**20))
    return digest
