"""Cameras and directories of this machine that clients may watch, by the names that the command line gives them.

A source is opened for the first client and closed after the last; every client has a slot of its own for the newest frame.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from ..frames.camera import Camera
from ..frames.directory import ImageDirectory
from ..frames.reconnect import Reconnecting
from ..frames.source import Frame, FrameSource, Newest
from ..frames.unreadable import UnreadableImages
from ..terminal.output import tell

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SharedSource:
    """A source with any number of watchers."""

    def __init__(self, opened: Callable[[], FrameSource]) -> None:
        """Watch what `opened` returns; it is called in the thread of the frames, and its errors go to the watchers."""
        self._opened, self._lock = opened, threading.Lock()
        self._watchers: list[Newest[Frame]] = []
        self._stop = threading.Event()

    @property
    def watchers(self) -> int:
        """Their number."""
        with self._lock:
            return len(self._watchers)

    @contextmanager
    def watched(self) -> Iterator[Newest[Frame]]:
        """Watch during the context; at its end a `take` that still waits returns None."""
        newest: Newest[Frame] = Newest()
        with self._lock:
            self._watchers.append(newest)
            if len(self._watchers) == 1:
                self._stop = threading.Event()
                threading.Thread(target=self._read, args=(self._stop,), name="frames", daemon=True).start()
        try:
            yield newest
        finally:
            with self._lock:
                self._watchers.remove(newest)
                if not self._watchers:
                    self._stop.set()
            newest.end()

    def _read(self, stop: threading.Event) -> None:
        error: BaseException | None = None
        try:
            for frame in Reconnecting(self._opened()).frames(stop):
                for newest in self._of(stop):
                    newest.put(frame)
                del frame  # only the slots hold it while waiting for the next one
        except BaseException as raised:
            error = raised
        for newest in self._of(stop):
            newest.end(error)

    def _of(self, stop: threading.Event) -> list[Newest[Frame]]:
        """Return the watchers of the thread with this event: those who came after the last one left have another."""
        with self._lock:
            return list(self._watchers) if stop is self._stop else []


def watch_sources(given: Sequence[str]) -> dict[str, SharedSource]:
    """Return sources by name, from NAME=SOURCE each; a directory, or else what `watch --camera` takes.

    Raises:
        InputError: not of this form, a name twice, or a source that can never be opened. MachineError: a library is missing.
    """
    found: dict[str, SharedSource] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or not source:
            raise InputError(f"--watch {text!r}: expected NAME=SOURCE, such as door=/dev/video0 or inbox=DIRECTORY")
        if name in found:
            raise InputError(f"--watch {text!r}: {name} is named twice; give each source its own name")
        found[name] = SharedSource(_opening(name, source))
    return found


def _opening(name: str, source: str) -> Callable[[], FrameSource]:
    """Return what opens a source, after a check of what can be checked without opening it."""
    directory = Path(source)
    if not directory.is_dir():
        Camera(source, must_be_there=False)
        return lambda: Camera(source, must_be_there=False)

    def of_directory() -> FrameSource:
        return ImageDirectory(directory, UnreadableImages(lambda image: tell(f"{name}: {image.error}", "yellow")))

    of_directory()
    return of_directory
