"""Stop strings: a streamed answer is cut before the first of them.

A stop string may be spread over several pieces of text, so the end of the text is held back while it could be the beginning of
one. The result is that of a search in the whole text: the stop string that begins first counts, even where a later one is
complete first.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError


class StopStrings:
    """Cuts a streamed text before the first stop string.

    Attributes:
        found: whether a stop string occurred, perhaps only in `rest`; the text from there on is never returned.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Begin a text. Raises InputError for an empty stop string, which occurs everywhere."""
        if "" in stops:
            raise InputError("a stop string is empty, expected one character or more; leave it out")
        self._stops, self._held, self.found = tuple(stops), "", False

    def feed(self, piece: str) -> str:
        """Return the text that can be sent after one more piece: no stop string, and no possible beginning of one."""
        if self.found:
            return ""
        text = self._held + piece
        occurs, opens = self._first_occurrence(text), self._first_beginning(text)
        if opens < occurs:
            self._held = text[opens:]
            return text[:opens]
        self.found, self._held = occurs < len(text), ""
        return text[:occurs]

    def rest(self) -> str:
        """Return, at the end of the text, what was held back and is not a stop string."""
        occurs, text, self._held = self._first_occurrence(self._held), self._held, ""
        self.found = self.found or occurs < len(text)
        return text[:occurs]

    def _first_occurrence(self, text: str) -> int:
        """Return the index of the first stop string in a text, or its length."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))

    def _first_beginning(self, text: str) -> int:
        """Return the index from which a text is a proper prefix of a stop string, or its length."""
        longest = max(map(len, self._stops), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        return next(
            (i for i in starts if any(len(s) > len(text) - i and s.startswith(text[i:]) for s in self._stops)), len(text)
        )
