"""Tables as data: each is described once, then written as Markdown for the docs or shown by rich on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import table

from ..terminal.output import cell, results

NOT_MEASURED = "not measured"
NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        columns: headings. On a terminal the first column is left-aligned, the others right-aligned.
        rows: cells, one per column; `**bold**` and backquotes are allowed.
        title: the line above the table.
        notes: lines below it.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()


def markdown(tables: Iterable[Table]) -> str:
    """Return tables as Markdown, separated by empty lines; "not measured" if there are none."""
    return "\n\n".join(block for found in tables for block in _blocks(found)) or NOT_MEASURED


def _blocks(found: Table) -> list[str]:
    lines = [_line(found.columns), "|---" * len(found.columns) + "|", *map(_line, found.rows)]
    return [*([found.title] if found.title else []), "\n".join(lines), *found.notes]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def terminal_table(found: Table) -> table.Table:
    """Return a table for rich, without markup."""
    shown = table.Table(title=cell(_plain(found.title)), title_justify="left", caption_justify="left")
    for index, column in enumerate(found.columns):
        shown.add_column(cell(column), justify="right" if index else "left")
    for row in found.rows:
        shown.add_row(*(cell(_plain(text)) for text in row))
    if found.notes:
        shown.caption = cell(_plain("\n".join(found.notes)))
    return shown


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")


def print_result(tables: Iterable[Table], file: Path) -> None:
    """Print tables on stdout, then the file that the result was written to."""
    for found in tables:
        results.print(terminal_table(found))
    results.print(f"wrote {file}", highlight=False)


def verdict(reached: bool) -> str:
    """Return "reached", or "missed" in bold."""
    return "reached" if reached else "**missed**"


def judged(value: float | None, reached: bool, form: str) -> str:
    """Return a value with its verdict; "not measured" for None."""
    return NOT_MEASURED if value is None else f"{value:{form}}, {verdict(reached)}"
