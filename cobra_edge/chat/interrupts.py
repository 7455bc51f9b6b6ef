"""Ctrl-C in a conversation: it ends an answer, or a line that is being written, and only then the program.

The signal's usual handler (terminal.py) is for work that is given up as a whole, and lets what follows at once go unheard. Here
it is replaced as long as the conversation lasts; other signals keep theirs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Pressed(KeyboardInterrupt):
    """Ctrl-C while no answer was being given."""


class Interrupts:
    """Says of each Ctrl-C whether it stops an answer."""

    def __init__(self) -> None:
        """Hear nothing yet."""
        self.stop = False  # what is being answered
        self._answering = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Take the signal; outside of `answering` it raises Pressed."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Note the signal in `stop`, to be looked at between two pieces, so that the answer can be asked on."""
        self.stop, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._answering:
            raise Pressed
        self.stop = True
