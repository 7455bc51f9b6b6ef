"""The table of `python -m bench.interval_coverage`: how often each interval holds the truth."""

from __future__ import annotations

from typing import Any

from .quality_tables import NOT_MEASURED

LEAST, MOST = 0.93, 0.97  # what an interval of 95 % was asked to reach
FEW_VALUES = 100  # a measure that takes no more has steps too large for an interval to hit 95 %: one or two lines fail


def coverage_table(result: dict[str, Any] | None, *, small: bool) -> str:
    """Return, of each measure, the share of drawn suites whose interval holds the whole suite's value, as Markdown.

    Args:
        result: what `python -m bench.interval_coverage` kept, or None.
        small: of the small suites, not of those as large as the whole one.
    """
    if result is None:
        return NOT_MEASURED
    sizes = sorted({row["images"] for row in result["rows"]})
    images = sizes[0] if small else sizes[-1]
    rows = [row for row in result["rows"] if row["images"] == images]
    builds = list(dict.fromkeys(row["build"] for row in rows))
    cells = {(row["measure"], row["build"]): row for row in rows}
    head = ["measure", "method", *builds]
    lines = [_line(head), "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["measure"] for row in rows):
        found = [cells.get((name, build)) for build in builds]
        method = next(row["method"] for row in found if row is not None)
        lines.append(_line([f"`{name}`", method, *(_cell(row) for row in found)]))
    drawn = f"{images} images, {result['replicates']} drawn suites, commit {result['machine']['commit']}"
    return "\n".join([*lines, "", f"{drawn}."])


def _cell(row: dict[str, Any] | None) -> str:
    """Say the share, and what is behind one that is out of bounds."""
    if row is None:
        return "–"
    share = f"{row['coverage']:.1%}"
    if row["values"] == 1:
        return f"{share} (always the same)"
    if LEAST <= row["coverage"] <= MOST:
        return share
    return f"{share} ({row['values']} values)" if row["values"] <= FEW_VALUES else f"**{share}**"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
