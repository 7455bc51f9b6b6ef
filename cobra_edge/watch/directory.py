"""Frames as image files that appear in a directory, or are written anew there."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..environment.requirements import install_hint
from ..errors import InputError, MachineError
from ..inputs.image import load_image
from ..inputs.image_format import image_endings, image_format, why_not_read
from ..terminal.output import tell
from .frames import Frame, SourceGone
from .unreadable import Unreadable, UnreadableImages

log = logging.getLogger(__name__)

_STEP_MS, _LONGEST_MS = 10, 100  # changes are gathered until none comes for a step
_TICK_MS = 200  # how often it is looked whether the directory is still there
_KNOWN_FILES = 1024
_SETTLED_SECONDS = 5.0  # a file that cannot be decoded and has not changed for so long is not being written any more
_RESTLESS_SECONDS = 20.0  # one that changes all the time and was never whole is told after so long

_Version = tuple[int, int, int]  # inode, size, mtime: what changes when a file is written anew


@dataclass(frozen=True)
class _Pending:
    """A file that could not be decoded so far.

    Attributes:
        version: that was tried.
        since: when that version was first tried, `time.monotonic()` seconds.
        restless: when any version was first tried, or was told.
        error: why it could not.
    """

    version: _Version
    since: float
    restless: float
    error: str


class ImageDirectory:
    """A directory into which images are written, by a camera's software perhaps; hidden files are not looked at."""

    def __init__(self, directory: Path, unreadable: UnreadableImages) -> None:
        """Check that it can be watched.

        Args:
            directory: where.
            unreadable: gets the files that are no image, when nobody writes to them any more.

        Raises:
            InputError: no such directory. MachineError: the library is missing.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give one into which images are written")
        self.directory = directory
        self._watchfiles = _watchfiles()
        self._unreadable = unreadable
        self._endings = image_endings()
        self._known: OrderedDict[str, _Version] = OrderedDict()  # files that were a frame or unreadable, and as what
        self._pending: dict[str, _Pending] = {}

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. A frame counts as captured when it was noticed that its file is there, or has changed."""
        number, begun = 0, False
        if not self.directory.is_dir():
            raise self._gone(number)
        for changes in self._watchfiles.watch(
            self.directory,
            watch_filter=None,
            step=_STEP_MS,
            debounce=_LONGEST_MS,
            rust_timeout=_TICK_MS,
            yield_on_timeout=True,
            stop_event=stop,
            recursive=False,
        ):
            noticed = time.perf_counter()
            if not self.directory.is_dir():
                raise self._gone(number)
            if not begun:  # from now on nothing is missed
                tell(f"watching {self.directory}")
                begun = True
            changed = {name for change, name in changes if change != self._watchfiles.Change.deleted}
            newest = self._newest(changed | self._judge())
            if newest is not None:
                name, image, older = newest
                number += older + 1
                yield Frame(number, name, noticed, functools.partial(_same, image))
                del image, newest  # not kept while the next one is waited for

    def _gone(self, number: int) -> SourceGone:
        return SourceGone(f"{self.directory}: went away after {number} images; watch it again when it is back")

    def _newest(self, paths: Iterable[str]) -> tuple[str, Image.Image, int] | None:
        """Return the newest whole image among files that changed, and how many older ones there are; None for none."""
        found: tuple[str, Image.Image] | None = None
        older = 0
        for name, version in self._changed(paths):
            if found is not None:
                if self._is_named_only(name, version):
                    continue
                older += 1
            elif (image := self._whole(name, version)) is not None:
                found = name, image
            else:
                continue
            self._pending.pop(name, None)
            self._know(name, version)
        return None if found is None else (*found, older)

    def _is_named_only(self, name: str, version: _Version) -> bool:
        """Whether a file that is let go unread could not have been read, by its first bytes; then it is pending."""
        file = self.directory / name
        try:
            if not file.is_file():  # a pipe would be waited for
                return False
            with file.open("rb") as stream:
                head = stream.read(1024)
        except OSError:
            return False  # gone again, or told when it comes alone
        why = why_not_read(head, image_format(head))
        if why is not None:
            self._wait_for(name, version, f"{file}: {why}")
        return why is not None

    def _whole(self, name: str, version: _Version) -> Image.Image | None:
        """Decode a file; None where it cannot be decoded, half written perhaps, or was written to meanwhile.

        Nothing is lost: it is pending, and looked at again when it has changed.
        """
        try:
            image = load_image(self.directory / name)
        except InputError as error:
            log.info("passed over for now: %s", error)
            self._wait_for(name, version, str(error))
            return None
        if self._version(name) != version:
            self._wait_for(
                name, version, f"{self.directory / name}: is written while it is read; write it elsewhere and rename it"
            )
            return None
        return image

    def _wait_for(self, name: str, version: _Version, error: str) -> None:
        now, before = time.monotonic(), self._pending.get(name)
        since, restless = (now, now) if before is None else (before.since, before.restless)
        if before is not None and before.version != version:
            since = now
        if now - restless >= _RESTLESS_SECONDS:
            restless = now
            self._unreadable.add(Unreadable(None, name, error))
        self._pending[name] = _Pending(version, since, restless, error)

    def _judge(self) -> set[str]:
        """Return pending files that have changed, to be tried again; give up those that nobody writes to any more."""
        changed = set()
        for name, pending in list(self._pending.items()):
            version = self._version(name)
            if version is None:  # gone again
                del self._pending[name]
            elif version != pending.version:
                changed.add(name)
            elif time.monotonic() - pending.since >= _SETTLED_SECONDS or len(self._pending) > _KNOWN_FILES:
                del self._pending[name]
                self._know(name, version)
                self._unreadable.add(Unreadable(None, name, pending.error))
        return changed

    def _know(self, name: str, version: _Version) -> None:
        self._known[name] = version
        self._known.move_to_end(name)
        if len(self._known) > _KNOWN_FILES:
            self._known.popitem(last=False)

    def _version(self, name: str) -> _Version | None:
        try:
            stat = os.stat(self.directory / name)
        except OSError:
            return None  # gone again
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _changed(self, paths: Iterable[str]) -> list[tuple[str, _Version]]:
        """Return the image files among the paths whose content was written, newest first."""
        changed = []
        for name in {Path(path).name for path in paths}:
            if name.startswith(".") or Path(name).suffix.lower() not in self._endings:
                continue
            version = self._version(name)
            if version is not None and self._known.get(name) != version:
                changed.append((name, version))
        return sorted(changed, key=lambda entry: (entry[1][2], entry[0]), reverse=True)


def _same(image: Image.Image) -> Image.Image:
    return image


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError as error:
        raise MachineError(f"--directory needs watchfiles ({error}); install it with: {install_hint('watch')}") from error
    return watchfiles
