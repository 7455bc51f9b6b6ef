"""Tables of the CUDA decoder's predicted speed (docs/results/gpu.md)."""

from __future__ import annotations

from collections.abc import Iterator

from cobra_edge.bench.tables import NO_VALUE, Table

from .cuda_paper import CudaPaperResult
from .predictions import span


def token_table(result: CudaPaperResult) -> Table:
    """Return bytes, instructions and launches per token, by scheme."""
    rows = [
        [
            token.scheme,
            f"{token.moved_bytes / 1e9:.2f}",
            f"{result.kernels[f'gemv_w{token.scheme[1]}'].instructions:.2f}",
            f"{token.warp_instructions / 1e6:.0f}",
            str(token.launches),
        ]
        for token in result.tokens
    ]
    columns = ["scheme", "GB per token", "instructions per byte of codes", "million warp instructions per token", "launches"]
    return Table(columns, rows)


def paper_table(result: CudaPaperResult, scheme: str = "w4a16-g128") -> Table:
    """Return bounds and predicted rates by device, with published measurements of other models."""
    rows = [
        [
            row.device,
            f"{row.memory_ms:.2f}",
            f"{row.issue_ms:.2f}",
            f"{row.launches_ms:.2f}",
            row.bound,
            span(*row.tokens_per_second, ".0f"),
            f"{span(*row.prompt_ms, '.0f')} ({row.prompt_bound})",
            "; ".join(_published(result, row.device)) or NO_VALUE,
        ]
        for row in result.predicted
        if row.scheme == scheme
    ]
    columns = ["device", "bytes, ms", "instructions, ms", "launches, ms", "bound", "tok/s, predicted"]
    columns += [f"prompt of {result.prompt_tokens}, ms, predicted", "published there, other models, tok/s"]
    return Table(columns, rows)


def _published(result: CudaPaperResult, device: str) -> Iterator[str]:
    """Yield measurements on the device; those without a power mode are shown at the first of its modes."""
    for anchor in result.published:
        if anchor.device in (device, device.removesuffix(", 15 W")):
            yield f"{anchor.what}: {anchor.tokens_per_second:.0f}"
