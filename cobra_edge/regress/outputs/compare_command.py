"""`regress compare`: two reports of one model, measure by measure."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import RenderableType
from rich.table import Table

from ...errors import DriftError
from ...files.staging import staged_file
from ...terminal.output import cell, debug_option, print_json, results
from ..report import Report, read_report
from .compare import Comparison, change_cells, changes_to_show
from .compare import compare as compare_reports
from .difference import shortened

_COLOURS = {"worse": "red", "lost": "red", "better": "green"}


@click.command(epilog="Example: python -m cobra_edge.regress compare main/report.json branch/report.json --fail-on-worse")
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.option("--fail-on-worse", is_flag=True, help="Exit with 1 where a measure is worse in B, beyond its interval.")
@click.option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write the comparison as a page, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def compare(before: Path, after: Path, fail_on_worse: bool, page: Path | None, as_json: bool) -> None:
    """Compare the report B with the earlier report A, each a report.json or the directory that has it."""
    found = compare_reports(report_at(before), report_at(after))
    if page is not None:
        _write_page(page, found)
    if as_json:
        print_json(found)
    else:
        for table in comparison_tables(found):
            results.print(table)
    if fail_on_worse and found.worse:
        raise DriftError(f"worse than before: {', '.join(found.worse)}; see the table, or take a wider scheme for what drifts")


def report_at(path: Path) -> Report:
    """Read a report.json or that of a directory. Raises InputError."""
    return read_report(path / "report.json" if path.is_dir() else path)


def _write_page(file: Path, found: Comparison) -> None:
    from .html import comparison_html

    content = comparison_html(found)
    with staged_file(file, force=True) as staged:
        staged.write_text(content, encoding="utf-8")


def comparison_tables(found: Comparison) -> list[RenderableType]:
    """Return what a terminal shows of a comparison."""
    table = Table(title=cell(f"{found.before} (before) and {found.after} (after)"), title_justify="left")
    for column in ("measure", "before", "after", "difference", "95 % interval", ""):
        table.add_column(column, justify="left" if column == "measure" else "right", overflow="fold")
    for change in changes_to_show(found):
        table.add_row(*(cell(text) for text in change_cells(change)), style=_COLOURS.get(change.word))
    shown: list[RenderableType] = [table]
    if found.differs:
        others = Table(title="what differs besides", title_justify="left")
        for column in ("", "before", "after"):
            others.add_column(column, overflow="fold")
        for field, (a, b) in found.differs.items():
            others.add_row(cell(field), cell(shortened(a, 80)), cell(shortened(b, 80)))
        shown.append(others)
    shown += [cell(f"warning: {warning}") for warning in found.warnings]
    return shown
