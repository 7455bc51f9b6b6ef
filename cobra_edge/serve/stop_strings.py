"""Where an answer ends because of what it says: strings of the client's at which it is cut.

Text comes in pieces that know nothing of those strings, so the end of what came is held back as long as it could be the
beginning of one. Of several that occur, the one that begins first counts, as if the whole text had been there at once: where
one is complete but an earlier beginning of a longer one is still open, that is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError


class StopStrings:
    """Cuts a text before the first of some strings, while it comes.

    Attributes:
        found: one of them came, maybe only in `rest`; it and what follows are never shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Begin a text. Raises InputError when a string is empty, since such a one is everywhere."""
        if "" in stops:
            raise InputError("a stop string is empty, expected one character or more; leave it out")
        self._stops, self._held, self.found = tuple(stops), "", False

    def feed(self, piece: str) -> str:
        """Return what may be shown now that a piece came: nothing of a stop string, nor of what may become one."""
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
        """Return, at the end of the text, what was held back and is no stop string."""
        occurs, text, self._held = self._first_occurrence(self._held), self._held, ""
        self.found = self.found or occurs < len(text)
        return text[:occurs]

    def _first_occurrence(self, text: str) -> int:
        """Return where the first stop string in a text begins, its length for none."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=len(text))

    def _first_beginning(self, text: str) -> int:
        """Return from where on a text is the beginning of a longer stop string, its length for none."""
        longest = max(map(len, self._stops), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        return next(
            (i for i in starts if any(len(s) > len(text) - i and s.startswith(text[i:]) for s in self._stops)), len(text)
        )
