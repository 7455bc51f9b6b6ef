"""The table of `python -m bench.fault_injection`: which planted faults each budget caught, and by what."""

from __future__ import annotations

from typing import Any

from .quality_tables import NOT_MEASURED


def faults_table(result: dict[str, Any] | None) -> str:
    """Return a row a fault, as Markdown.

    Args:
        result: what `python -m bench.fault_injection` kept, or None.
    """
    if result is None:
        return NOT_MEASURED
    head = [
        "what is broken",
        "build",
        "caught",
        "by the budget that ships",
        "by the expected measure",
        "furthest beyond its limit",
        "missed, but told from the good build",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    caught, planted = (sum(row[part] for row in result["rows"]) for part in ("caught", "draws"))
    shipped = sum(row["caught_by_shipped"] for row in result["rows"])
    total = f"{planted} planted faults: {caught} caught by cobra-mini's own budget, {shipped} by the one that ships"
    return "\n".join([*lines, "", f"{total}. Commit {result['machine']['commit']}."])


def _cells(row: dict[str, Any]) -> list[str]:
    of = f"of {row['draws']}"
    layers = any(name.startswith("state_error.") for name in row["expected"])
    expected = " or ".join(f"`{name}`" for name in row["expected"] if not name.startswith("state_error."))
    expected += " or a layer's" if layers else ""
    furthest = f"`{row['worst']}`, {row['worst_times']:.2g} times" if row["worst"] else "–"
    if row["refused"]:
        furthest = f"refused with exit code {row['exit_codes'][0]}"
    return [
        row["description"],
        f"`{row['build']}`",
        f"{row['caught']} {of}",
        f"{row['caught_by_shipped']} {of}",
        f"{expected}: {row['expected_failed']} {of}" if expected else "–",
        furthest,
        f"{row['detected_against_good_build']} of {row['draws'] - row['caught']}" if row["caught"] < row["draws"] else "–",
    ]
