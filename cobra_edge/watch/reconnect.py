"""A source that goes away is opened again, and again after longer and longer waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from ..terminal.output import tell
from .frames import Frame, FrameSource, SourceGone

_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 30.0


class Reconnecting:
    """Frames of a source, over all its absences; their numbers go on."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`; ends where the source does, and raises what it raises, but for `SourceGone`."""
        wait, number = _FIRST_SECONDS, 0
        while not stop.is_set():
            before = number
            try:
                for frame in self._source.frames(stop):
                    number = before + frame.number
                    yield replace(frame, number=number)
                    del frame  # not kept while the next one is waited for
                return
            except SourceGone as gone:
                wait = _FIRST_SECONDS if number > before else wait
                tell(f"{gone}; trying again in {wait:.0f} s")
            stop.wait(wait)
            wait = min(2 * wait, _LONGEST_SECONDS)
