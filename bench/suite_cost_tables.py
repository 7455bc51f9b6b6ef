"""The table of `python -m bench.regress` (docs/results/regress.md): time and memory of a run of the harness."""

from __future__ import annotations

from typing import Any

NOT_MEASURED = "not measured"


def suite_cost_table(result: dict[str, Any] | None) -> str:
    """Return seconds and peak memory by baseline and by length as Markdown."""
    if result is None:
        return NOT_MEASURED
    machine, rounds = result["machine"], result["rows"][0]["rounds"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; medians of {rounds} runs in turns, low and high "
        "in brackets, the whole command.",
        "",
        "| build | baseline | lines | seconds | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = f"{row['scheme']}, with attribution"
        lines.append(f"| {name} | {row['baseline']} | {row['lines']} | {_spread(row['seconds'], '.1f')} | {_peak(row)} |")
    for row in result["lengths"]:
        name = f"{result['rows'][0]['scheme']}, lines alone"
        lines.append(f"| {name} | fp16 bundle | {row['lines']:,} | {_spread(row['seconds'], '.1f')} | {_peak(row)} |")
    return "\n".join(lines)


def _peak(row: dict[str, Any]) -> str:
    return _spread(row["peak_mib"], ".0f")


def _spread(spread: dict[str, float], form: str) -> str:
    return f"{spread['median']:{form}} ({spread['low']:{form}}–{spread['high']:{form}})"
