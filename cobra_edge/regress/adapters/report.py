"""Results of a benchmark harness: one JSON object, or a table."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from ...errors import InputError
from ...files.staging import staged_file
from ...terminal.output import cell, figure
from ...terminal.output import results as console
from ...version import __version__
from .model_adapter import ModelAdapter


class HarnessRuntime(msgspec.Struct, frozen=True):
    """The runtimes that ran the bundle, by name."""

    decoder: str
    vision: str | None


class HarnessReport(msgspec.Struct, frozen=True, rename={"n_shot": "n-shot", "n_samples": "n-samples"}, omit_defaults=True):
    """Report of a run.

    Attributes:
        harness, harness_version: name and version of the library.
        prompts: "raw", or the style of the bundle's template.
        shortened_prompts: number of requests that were truncated to the model's length.
        results, groups, versions, n_shot, n_samples: of the library, by task.
    """

    harness: str
    harness_version: str
    cobra_edge_version: str
    model: str
    scheme: str
    runtime: HarnessRuntime
    prompts: str
    shortened_prompts: int
    results: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    n_shot: dict[str, Any] = {}
    n_samples: dict[str, Any] = {}


def report_of(harness: str, version: str, adapter: ModelAdapter, found: Mapping[str, Any]) -> HarnessReport:
    """Return the report of a run.

    Args:
        harness, version: of the library.
        adapter: the model that was evaluated.
        found: results of the library.
    """
    session = adapter.session
    return HarnessReport(
        harness=harness,
        harness_version=version,
        cobra_edge_version=__version__,
        model=session.config.model_id,
        scheme=session.bundle.manifest.recipe.scheme,
        runtime=HarnessRuntime(session.decoder.name, None if session.vision is None else session.vision.name),
        prompts="raw" if adapter.raw_prompts else session.template.style,
        shortened_prompts=adapter.shortened,
        results=_plain(found.get("results", {})),
        groups=_plain(found.get("groups", {})),
        versions=_plain(found.get("versions", {})),
        n_shot=_plain(found.get("n-shot", {})),
        n_samples=_plain(found.get("n-samples", {})),
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numpy's numbers become Python's, numbers that are not finite become null."""
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
    """Raise InputError if a report could not be written: before hours of work, not after them."""
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such directory; create it before --out {file}")
    if file.is_dir():
        raise InputError(f"{file}: is a directory; give --out the path of a file")


def write_report(report: HarnessReport, file: Path) -> None:
    """Write a report, whole or not at all. Raises OSError as the file system does."""
    with staged_file(file, force=True) as staged:
        staged.write_text(json.dumps(msgspec.to_builtins(report), indent=2) + "\n", encoding="utf-8")


def show(report: HarnessReport) -> None:
    """Print a report as a table: one row per task and measure."""
    vision = "" if report.runtime.vision is None else f", vision by {report.runtime.vision}"
    title = (
        f"{report.harness} {report.harness_version}: {report.model} {report.scheme}, "
        f"{report.prompts} prompts, decoder by {report.runtime.decoder}{vision}"
    )
    table = Table(title=cell(title), title_justify="left")
    for name in ("task", "measure"):
        table.add_column(name)
    for name in ("value", "± standard error", "n"):
        table.add_column(name, justify="right")
    for task, measures in {**report.results, **report.groups}.items():
        count = report.n_samples.get(task, {}).get("effective", "")
        for name, value in measures.items():
            measure, _, filtered = name.partition(",")
            if "," not in name or "_stderr" in measure or not isinstance(value, float | int):
                continue
            error = measures.get(f"{measure}_stderr,{filtered}")
            label = measure if filtered in ("", "none") else f"{measure} ({filtered})"
            spread = figure(error) if isinstance(error, float) else ""
            table.add_row(cell(task), cell(label), figure(value), spread, str(count))
    console.print(table)
    if report.shortened_prompts:
        console.print(f"{report.shortened_prompts} requests were longer than the model accepts and were truncated on the left")
