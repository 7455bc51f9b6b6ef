"""Unreadable images: counted, each reported once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import msgspec

_MAX_NAMES = 1024  # names whose last error is kept


class Unreadable(msgspec.Struct, frozen=True):
    """An unreadable image.

    Attributes:
        frame: frame number; None for a file that did not become a frame.
        name: file name, or None.
        error: why, and what to do.
    """

    frame: int | None
    name: str | None
    error: str


class UnreadableImages:
    """Collects unreadable images from the frame thread and the answering thread.

    Attributes:
        count: number so far.
    """

    def __init__(self, report: Callable[[Unreadable], None]) -> None:
        """Begin with none; `report` is called for each, once for consecutive ones of equal name and error."""
        self.count = 0
        self._report = report
        self._errors: OrderedDict[str | None, str] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, image: Unreadable) -> None:
        """Count an image, and report it unless that was done."""
        with self._lock:
            self.count += 1
            if self._errors.get(image.name) == image.error:
                return
            self._errors[image.name] = image.error
            self._errors.move_to_end(image.name)
            if len(self._errors) > _MAX_NAMES:
                self._errors.popitem(last=False)
            self._report(image)
