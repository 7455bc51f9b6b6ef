"""Frames, frame sources, and the slot that holds the newest frame.

A source yields frames in its own thread; the answering thread takes the newest one when it is ready. Frames in between are
dropped, so that an answer is about the current scene and at most one frame waits in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from PIL import Image

from ..errors import MachineError

# Signals may be delivered to another thread and then do not interrupt waiting for a lock; Python's handlers run at the next
# timeout of the wait.
_WAKE_SECONDS = 0.5
_JOIN_SECONDS = 2.0  # for a source inside a library call; the thread is a daemon

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Frame:
    """A captured image.

    Attributes:
        number: counts all frames from 1; gaps between answered frames are dropped ones.
        name: file name, or None.
        captured: `time.perf_counter()` seconds of the capture.
        image: returns the RGB image; called only for frames that are answered.
    """

    number: int
    name: str | None
    captured: float
    image: Callable[[], Image.Image]


class SourceLost(MachineError):
    """A source is not available, or not any more; it may come back."""


class FrameSource(Protocol):
    """A source of frames."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames, without keeping references, until the source ends or `stop` is set.

        Raises:
            InputError, MachineError: the source cannot be opened.
            SourceLost: the source is not available, or not any more.
        """
        ...


class Newest(Generic[T]):
    """A slot that holds at most one item, the newest."""

    def __init__(self) -> None:
        """Create an empty slot."""
        self._changed = threading.Condition()
        self._held: T | None = None
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Replace the item."""
        with self._changed:
            self._held = item
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Mark the end of the items, with the error that caused it if any."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> T | None:
        """Wait for an item and remove it; None at the end. Raises the error passed to `end`, after the last item."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._held is not None or self._ended, _WAKE_SECONDS):
                pass
            taken, self._held = self._held, None
        if taken is None and self._error is not None:
            raise self._error
        return taken


@contextmanager
def grab_frames(source: FrameSource) -> Iterator[Newest[Frame]]:
    """Read a source in a thread during the context; `take` raises its errors."""
    newest: Newest[Frame] = Newest()
    stop = threading.Event()
    thread = threading.Thread(target=_grab, args=(source, newest, stop), name="frames", daemon=True)
    thread.start()
    try:
        yield newest
    finally:
        stop.set()
        thread.join(_JOIN_SECONDS)


def _grab(source: FrameSource, newest: Newest[Frame], stop: threading.Event) -> None:
    try:
        for frame in source.frames(stop):
            newest.put(frame)
            del frame  # only `newest` holds it while waiting for the next frame
    except BaseException as error:
        newest.end(error)
    else:
        newest.end()
