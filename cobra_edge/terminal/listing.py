"""Tables for a terminal that break no number, and no word that fits on a line, however narrow the terminal is.

What does not fit beside the rest goes below it: a long name stands on a line of its own above its row, and the last columns
become lines below it, each with its header. Only the last column is wrapped, between words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from .output import plain

_GAP, _INDENT = "  ", "    "
_NAME = 18  # columns that the names of rows have at least, unless all are shorter
_TEXT = 30  # columns that a text in the last column has at least, unless it is shorter


class Row(NamedTuple):
    """Untrusted text by column, and a style of rich."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Listing:
    """A table to print with rich.

    Attributes:
        title: above it; empty for none.
        head: a header for each column; all empty for no line of headers.
        rows: each with a cell for every column.
        numbers: indices of the columns that are aligned to the right.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Row]
    numbers: Sequence[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines."""
        room = options.max_width
        yield from (Text(line, "bold") for line in wrapped("", self.title, room) if line)
        rows = [Row([plain(text).replace("\n", " ") for text in row.cells], row.style) for row in self.rows]
        widths = self._widths(rows, room)
        if any(self.head):
            yield from (Text(line, "dim") for line in self._beside(self.head[: len(widths)], widths, room))
        for row in rows:
            lines = self._beside(row.cells[: len(widths)], widths, room)
            for name, text in list(zip(self.head, row.cells, strict=True))[len(widths) :]:
                lines += wrapped(_INDENT, f"{name} {text}", room) if text else []
            yield from (Text(line, row.style) for line in lines)

    def _widths(self, rows: Sequence[Row], room: int) -> list[int]:
        """Return the widths of the columns that stand beside each other."""
        columns = list(zip(self.head, *(row.cells for row in rows), strict=True))
        widths = [max(map(cell_len, column)) for column in columns]
        for count in range(len(columns), 1, -1):
            name, *others, last = widths[:count]
            if count - 1 not in self.numbers:
                words = (cell_len(word) for text in columns[count - 1] for word in text.split())
                last = max(min(last, _TEXT), max(words, default=0))
            left = room - sum(others) - last - len(_GAP) * (count - 1)
            if left >= min(name, _NAME):
                return [min(name, left), *widths[1:count]]
        return [room]

    def _beside(self, cells: Sequence[str], widths: Sequence[int], room: int) -> list[str]:
        """Return the lines of cells that stand beside each other."""
        name, *others = cells
        if not others:
            return wrapped("", name, room)
        above = cell_len(name) > widths[0]
        lead = _padded("" if above else name, widths[0])
        for i, text in enumerate(others[:-1], 1):
            lead += _GAP + _padded(text, widths[i], i in self.numbers)
        last = _padded(others[-1], widths[-1] if len(others) in self.numbers else 0, right=True)
        lead += _GAP + last[: len(last) - len(others[-1])]
        return [*(wrapped("", name, room) if above else ()), *wrapped(lead, others[-1], room)]


def _padded(text: str, width: int, right: bool = False) -> str:
    pad = " " * (width - cell_len(text))
    return pad + text if right else text + pad


def wrapped(lead: str, text: str, room: int) -> list[str]:
    """Return text in lines, wrapped between words; the first begins with the lead, the others are indented as much."""
    lines = textwrap.wrap(text, room, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)
    return lines or [lead.rstrip()]
