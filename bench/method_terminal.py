"""The tables of `python -m bench.methods` for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from cobra_edge.terminal.output import cell

from .method_tables import tables


def methods_tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the tables of a result."""
    for cells in tables(result):
        table = Table(title=cell(cells.head.replace("**", "")), title_justify="left")
        for index, column in enumerate(cells.columns):
            table.add_column(cell(column), justify="right" if index else "left")
        for row in cells.rows:
            table.add_row(*(cell(text.replace("**", "")) for text in row))
        yield table
