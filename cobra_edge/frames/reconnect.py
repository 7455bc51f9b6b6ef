"""Reconnection to a lost source, with exponential backoff."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from ..terminal.output import tell
from .source import Frame, FrameSource, SourceLost

_FIRST_SECONDS, _MAX_SECONDS = 1.0, 30.0


class Reconnecting:
    """Frames of a source across reconnections, numbered consecutively."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. SourceLost is handled; other errors are raised."""
        wait, number = _FIRST_SECONDS, 0
        while not stop.is_set():
            before = number
            try:
                for frame in self._source.frames(stop):
                    number = before + frame.number
                    yield replace(frame, number=number)
                    del frame  # not kept while waiting for the next frame
                return
            except SourceLost as lost:
                wait = _FIRST_SECONDS if number > before else wait
                tell(f"{lost}; retrying in {wait:.0f} s")
            stop.wait(wait)
            wait = min(2 * wait, _MAX_SECONDS)
