"""What the CUDA decoder should reach on paper, as Markdown (docs/results/gpu.md)."""

from __future__ import annotations

from typing import Any

from .predict_tables import span


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _whole(ends: list[float]) -> str:
    low, high = ends
    return span(low, high, ".0f")


def token_table(result: dict[str, Any] | None) -> str:
    """Return what a token takes by scheme: bytes, instructions, launches."""
    if result is None:
        return "not counted"
    kernels = result["kernels"]
    rows = []
    for t in result["tokens"]:
        gemv = kernels[f"gemv_w{t['scheme'][1]}"]
        rows.append(
            [
                t["scheme"],
                f"{t['moved_bytes'] / 1e9:.2f}",
                f"{gemv['instructions']:.2f}",
                f"{t['warp_instructions'] / 1e6:.0f}",
                str(t["launches"]),
            ]
        )
    columns = ["scheme", "GB a token", "instructions a byte of codes", "million warp instructions a token", "launches"]
    return _table(columns, rows)


def paper_table(result: dict[str, Any] | None, scheme: str = "w4a16-g128") -> str:
    """Return bounds and predicted rates by device, with what others published there."""
    if result is None:
        return "not counted"
    published: dict[str, list[str]] = {}
    for anchor in result["published"]:
        name = anchor["device"].partition(",")[0] if "Super" not in anchor["device"] else anchor["device"]
        published.setdefault(name, []).append(f"{anchor['what']}: {anchor['tokens_per_second']:.0f}")
    rows = []
    for p in result["predicted"]:
        if p["scheme"] != scheme:
            continue
        beside = published.get(p["device"], published.get(p["device"].removesuffix(", 15 W"), []))
        rows.append(
            [
                p["device"],
                f"{p['memory_ms']:.2f}",
                f"{p['issue_ms']:.2f}",
                f"{p['launches_ms']:.2f}",
                p["bound"],
                _whole(p["tokens_per_second"]),
                f"{_whole(p['prompt_ms'])} ({p['prompt_bound']})",
                "; ".join(beside) or "–",
            ]
        )
    columns = [
        "device",
        "bytes, ms",
        "instructions, ms",
        "launches, ms",
        "bound",
        "tok/s, predicted",
        f"prompt of {result['prompt_tokens']}, ms, predicted",
        "published there, other models, tok/s",
    ]
    return _table(columns, rows)
