"""Images that came and could not be looked at: counted, and told once each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import msgspec

_TOLD = 1024  # names whose reason is remembered


class Unreadable(msgspec.Struct, frozen=True):
    """An image that could not be looked at.

    Attributes:
        frame: its number, where it counted as a frame; None for a file that never did.
        name: of its file, or None.
        error: why, and what to do.
    """

    frame: int | None
    name: str | None
    error: str


class UnreadableImages:
    """Takes them from the thread that grabs frames and from the one that answers.

    Attributes:
        count: how many there were.
    """

    def __init__(self, tell: Callable[[Unreadable], None]) -> None:
        """Begin with none; `tell` is called for each, but once for those of one name and reason that follow each other."""
        self.count = 0
        self._tell = tell
        self._told: OrderedDict[str | None, str] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Unreadable) -> None:
        """Count one, and tell it where that was not done before."""
        with self._lock:
            self.count += 1
            if self._told.get(image.name) == image.error:
                return
            self._told[image.name] = image.error
            self._told.move_to_end(image.name)
            if len(self._told) > _TOLD:
                self._told.popitem(last=False)
            self._tell(image)
