"""What a harness found: one JSON object, or a table."""

from __future__ import annotations

import json
import math
import numbers
from pathlib import Path
from typing import Any

from rich.table import Table

from ...errors import InputError
from ...files.staging import staged_file
from ...terminal.output import cell, figure
from ...terminal.output import results as console
from ...version import __version__
from .model_adapter import ModelAdapter

_KEPT = ("results", "groups", "versions", "n-shot", "n-samples")


def report_of(harness: str, version: str, model_adapter: ModelAdapter, found: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a run as plain JSON values.

    Args:
        harness, version: of the library.
        model adapter: what was examined.
        found: the library's results.
    """
    session = model_adapter.session
    return {
        "harness": harness,
        "harness_version": version,
        "cobra_edge_version": __version__,
        "model": session.config.model_id,
        "scheme": session.bundle.manifest.recipe.scheme,
        "runtime": {"decoder": session.decoder.name, "vision": None if session.vision is None else session.vision.name},
        "prompts": "raw" if model_adapter.raw_prompts else session.template.style,
        "shortened_prompts": model_adapter.shortened,
        **{key: _plain(found[key]) for key in _KEPT if key in found},
    }


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it; numpy's numbers become Python's, what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def require_writable(file: Path) -> None:
    """Raise InputError where a report could not be written: found out before hours of work."""
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such directory; make it before --out {file}")
    if file.is_dir():
        raise InputError(f"{file}: is a directory; give --out the path of a file")


def write_report(report: dict[str, Any], file: Path) -> None:
    """Write a report, whole or not at all. Raises OSError as the file system does."""
    with staged_file(file, force=True) as staged:
        staged.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def show(report: dict[str, Any]) -> None:
    """Print a report as a table: a row for each task and measure."""
    runtime = report["runtime"]
    seen = "" if runtime["vision"] is None else f", vision by {runtime['vision']}"
    title = (
        f"{report['harness']} {report['harness_version']}: {report['model']} {report['scheme']}, "
        f"{report['prompts']} prompts, decoder by {runtime['decoder']}{seen}"
    )
    table = Table(title=cell(title), title_justify="left")
    for name, justify in (
        ("task", "left"),
        ("measure", "left"),
        ("value", "right"),
        ("± standard error", "right"),
        ("n", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for task, measures in {**report.get("results", {}), **report.get("groups", {})}.items():
        count = report.get("n-samples", {}).get(task, {}).get("effective", "")
        for name, value in measures.items():
            measure, _, filtered = name.partition(",")
            if "," not in name or "_stderr" in measure or not isinstance(value, float | int):
                continue
            error = measures.get(f"{measure}_stderr,{filtered}")
            label = measure if filtered in ("", "none") else f"{measure} ({filtered})"
            spread = figure(error) if isinstance(error, float) else ""
            table.add_row(cell(task), cell(label), figure(value), spread, str(count))
    console.print(table)
    if report["shortened_prompts"]:
        console.print(f"{report['shortened_prompts']} requests were longer than the model takes and lost their beginning")
