"""Ctrl-C in a chat: it stops an answer or clears the line being edited; twice in a row it exits.

The usual handler of SIGINT (terminal/output.py) ends the whole command and ignores repeated signals. It is replaced during the
conversation; the handlers of other signals stay.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Pressed(KeyboardInterrupt):
    """Ctrl-C while no answer was being generated."""


class Interrupts:
    """Handles SIGINT: during an answer it sets a flag, otherwise it raises `Pressed`."""

    def __init__(self) -> None:
        """Create it; the handler is not installed yet."""
        self.stop = False  # stop the current answer
        self._answering = False

    @contextmanager
    def handle_sigint(self) -> Iterator[None]:
        """Install the handler; outside of `answering` it raises Pressed."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Set `stop` on SIGINT, to be checked between two pieces, so that the conversation can continue."""
        self.stop, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._answering:
            raise Pressed
        self.stop = True
