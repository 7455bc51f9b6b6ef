"""A frame, what gives them, and the one place where the newest waits.

A source gives frames at its own pace in a thread of its own; whoever answers takes the newest when it is ready for one. What
came in between is let go, so that an answer is about what is to be seen now, and memory holds one waiting frame however slow
answers are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from PIL import Image

from ..errors import MachineError

# Two signals at once may both be taken by another thread of the process, and then do not wake this one from waiting for a lock;
# Python's handlers run when it looks up by itself.
_LOOK_UP_SECONDS = 0.5
_LEAVING_SECONDS = 2.0  # for a source that is inside a library's call; the thread does not keep the program

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Frame:
    """An image that has come.

    Attributes:
        number: how many have come so far, with this one; a gap between two that were answered is what was let go.
        name: of its file, or None where it has none.
        captured: when it came, `time.perf_counter()` seconds.
        image: makes the image, RGB; called for frames that are asked about only.
    """

    number: int
    name: str | None
    captured: float
    image: Callable[[], Image.Image]


class SourceGone(MachineError):
    """A source went away, or is not there yet: it may be back later."""


class FrameSource(Protocol):
    """What gives frames."""

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """Yield frames as they come, without keeping them, until the source is at its end or `stop` is set.

        Raises:
            InputError, MachineError: it cannot be opened. SourceGone: it went away, or is not there yet.
        """
        ...


class Newest(Generic[T]):
    """Holds at most one thing, the newest."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._changed = threading.Condition()
        self._held: T | None = None
        self._ended = False
        self._error: BaseException | None = None

    def put(self, thing: T) -> None:
        """Hold this, instead of what is held."""
        with self._changed:
            self._held = thing
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more will come, and why where it should have."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> T | None:
        """Return the newest, waiting for one; None when nothing more will come. Raises the error that it ended with, last."""
        with self._changed:
            while not self._changed.wait_for(lambda: self._held is not None or self._ended, _LOOK_UP_SECONDS):
                pass
            taken, self._held = self._held, None
        if taken is None and self._error is not None:
            raise self._error
        return taken


@contextmanager
def grabbing(source: FrameSource) -> Iterator[Newest[Frame]]:
    """Take frames from a source in a thread, as long as the context lasts; its errors are raised where frames are taken."""
    newest: Newest[Frame] = Newest()
    stop = threading.Event()
    thread = threading.Thread(target=_grab, args=(source, newest, stop), name="frames", daemon=True)
    thread.start()
    try:
        yield newest
    finally:
        stop.set()
        thread.join(_LEAVING_SECONDS)


def _grab(source: FrameSource, newest: Newest[Frame], stop: threading.Event) -> None:
    try:
        for frame in source.frames(stop):
            newest.put(frame)
            del frame  # while the next one is waited for only `newest` has it
    except BaseException as error:
        newest.end(error)
    else:
        newest.end()
