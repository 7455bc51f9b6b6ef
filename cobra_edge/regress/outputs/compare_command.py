"""`regress compare`: two reports of one model, measure by measure."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import RenderableType

from ...errors import DriftError
from ...files.staging import staged_file
from ...terminal.listing import Listing, Row
from ...terminal.option_groups import Command, option
from ...terminal.output import cell, debug_option, print_json, results
from ..report import Report, read_report
from .compare import Comparison, change_cells, changes_to_show
from .compare import compare as compare_reports
from .difference import shortened
from .rows import SHOWN

_COLOURS = {"worse": "red", "lost": "red", "better": "green"}
_PATH = click.Path(path_type=Path)


@click.command(cls=Command, epilog="Example: cobra-edge regress compare main/report.json branch/report.json --fail-on-worse")
@click.argument("before", metavar="A", type=_PATH)
@click.argument("after", metavar="B", type=_PATH)
@option("--fail-on-worse", group="limit", is_flag=True, help="Exit with 1 if a measure of B is significantly worse.")
@option("--html", "page", group="output", type=click.Path(path_type=Path, dir_okay=False), help="HTML page to write.")
@option("--all", "everything", group="output", is_flag=True, help="Print every row.")
@option("--json", "as_json", group="output", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def compare(before: Path, after: Path, fail_on_worse: bool, page: Path | None, everything: bool, as_json: bool) -> None:
    """Compare report B with the earlier report A; each is a report.json or its directory."""
    found = compare_reports(report_at(before), report_at(after))
    if page is not None:
        _write_page(page, found)
    if as_json:
        print_json(found)
    else:
        for table in comparison_tables(found, everything):
            results.print(table)
    if fail_on_worse and found.worse:
        raise DriftError(f"worse than before: {', '.join(found.worse)}; see the table, or give the parts that drift more bits")


def report_at(path: Path) -> Report:
    """Read a report.json, given as a file or by its directory. Raises InputError."""
    return read_report(path / "report.json" if path.is_dir() else path)


def _write_page(file: Path, found: Comparison) -> None:
    from .html import comparison_html

    content = comparison_html(found)
    with staged_file(file, force=True) as staged:
        staged.write_text(content, encoding="utf-8")


def comparison_tables(found: Comparison, everything: bool = False) -> list[RenderableType]:
    """Return the tables and warnings that a terminal shows of a comparison: all rows, or the first."""
    rows, changes = [], changes_to_show(found)
    for change in changes if everything else changes[:SHOWN]:
        before, after, step, ends, word = change_cells(change)
        rows.append(Row((change.measure, word, before, after, step, ends), _COLOURS.get(change.word, "")))
    head = ("measure", "verdict", "before", "after", "difference", "95 % interval")
    shown: list[RenderableType] = [
        cell(f"worse: {len(found.worse)} measures, better: {len(found.better)}"),
        *(cell(f"warning: {warning}") for warning in found.warnings),
        "",
        Listing(f"{found.before} (before) and {found.after} (after)", head, rows, numbers=(2, 3, 4)),
        *([f"{len(changes) - len(rows)} more measures: --all, or --html FILE"] if len(changes) > len(rows) else ()),
        "what a measure means: cobra-edge regress --explain MEASURE",
    ]
    if found.differs:
        others = [Row((field, shortened(a, 80), shortened(b, 80))) for field, (a, b) in found.differs.items()]
        shown += ["", Listing("", ("other differences", "before", "after"), others)]
    return shown
