"""Frame source for a directory: new and rewritten image files."""

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
from .source import Frame, SourceLost
from .unreadable import Unreadable, UnreadableImages

log = logging.getLogger(__name__)

_STEP_MS, _LONGEST_MS = 10, 100  # changes are collected until none comes for one step
_TICK_MS = 200  # interval of checks that the directory exists
_KNOWN_FILES = 1024
_SETTLED_SECONDS = 5.0  # without a change, after which an unreadable file counts as completely written
_CHANGING_SECONDS = 20.0  # of changes, after which a file that was never readable is reported

_Version = tuple[int, int, int]  # inode, size, mtime: changes when a file is rewritten


@dataclass(frozen=True)
class _Pending:
    """A file that could not be decoded yet.

    Attributes:
        version: of the last attempt.
        since: first attempt with this version, `time.monotonic()` seconds.
        changing_since: first attempt with any version, or last report.
        error: of the last attempt.
    """

    version: _Version
    since: float
    changing_since: float
    error: str


class ImageDirectory:
    """A directory into which images are written; hidden files are ignored."""

    def __init__(self, directory: Path, unreadable: UnreadableImages) -> None:
        """Check that the directory can be watched.

        Args:
            directory: to watch.
            unreadable: receives files that are complete and not readable images.

        Raises:
            InputError: no such directory.
            MachineError: watchfiles is missing.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give the one into which images are written")
        self.directory = directory
        self._watchfiles = _watchfiles()
        self._unreadable = unreadable
        self._endings = image_endings()
        self._known: OrderedDict[str, _Version] = OrderedDict()  # files that became a frame or were unreadable
        self._pending: dict[str, _Pending] = {}

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. The capture time is when the change of the file was noticed."""
        number, begun = 0, False
        if not self.directory.is_dir():
            raise self._lost(number)
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
                raise self._lost(number)
            if not begun:  # from now on no change is missed
                tell(f"watching {self.directory}")
                begun = True
            changed = {name for change, name in changes if change != self._watchfiles.Change.deleted}
            newest = self._newest(changed | self._recheck())
            if newest is not None:
                name, image, older = newest
                number += older + 1
                yield Frame(number, name, noticed, functools.partial(_return_image, image))
                del image, newest  # not kept while waiting for the next frame

    def _lost(self, number: int) -> SourceLost:
        return SourceLost(f"{self.directory}: removed after {number} images; watch it again when it exists")

    def _newest(self, paths: Iterable[str]) -> tuple[str, Image.Image, int] | None:
        """Return name and image of the newest readable file among the changed ones, and the number of older ones; or None."""
        found: tuple[str, Image.Image] | None = None
        older = 0
        for name, version in self._changed(paths):
            if found is not None:
                if self._is_unreadable(name, version):
                    continue
                older += 1
            elif (image := self._decode(name, version)) is not None:
                found = name, image
            else:
                continue
            self._pending.pop(name, None)
            self._mark_known(name, version)
        return None if found is None else (*found, older)

    def _is_unreadable(self, name: str, version: _Version) -> bool:
        """Whether a dropped file is unreadable, by its first bytes; then it becomes pending."""
        file = self.directory / name
        try:
            if not file.is_file():  # reading a pipe would block
                return False
            with file.open("rb") as stream:
                head = stream.read(1024)
        except OSError:
            return False  # gone, or reported when it changes alone
        why = why_not_read(head, image_format(head))
        if why is not None:
            self._defer(name, version, f"{file}: {why}")
        return why is not None

    def _decode(self, name: str, version: _Version) -> Image.Image | None:
        """Decode a file; None where it is unreadable (perhaps incomplete) or changed meanwhile. Then it becomes pending."""
        try:
            image = load_image(self.directory / name)
        except InputError as error:
            log.info("ignored for now: %s", error)
            self._defer(name, version, str(error))
            return None
        if self._version(name) != version:
            self._defer(name, version, f"{self.directory / name}: changed while it was read; write it elsewhere and rename it")
            return None
        return image

    def _defer(self, name: str, version: _Version, error: str) -> None:
        now, before = time.monotonic(), self._pending.get(name)
        since, changing_since = (now, now) if before is None else (before.since, before.changing_since)
        if before is not None and before.version != version:
            since = now
        if now - changing_since >= _CHANGING_SECONDS:
            changing_since = now
            self._unreadable.add(Unreadable(None, name, error))
        self._pending[name] = _Pending(version, since, changing_since, error)

    def _recheck(self) -> set[str]:
        """Return the pending files that have changed; report those that have settled as unreadable."""
        changed = set()
        for name, pending in list(self._pending.items()):
            version = self._version(name)
            if version is None:  # gone
                del self._pending[name]
            elif version != pending.version:
                changed.add(name)
            elif time.monotonic() - pending.since >= _SETTLED_SECONDS or len(self._pending) > _KNOWN_FILES:
                del self._pending[name]
                self._mark_known(name, version)
                self._unreadable.add(Unreadable(None, name, pending.error))
        return changed

    def _mark_known(self, name: str, version: _Version) -> None:
        self._known[name] = version
        self._known.move_to_end(name)
        if len(self._known) > _KNOWN_FILES:
            self._known.popitem(last=False)

    def _version(self, name: str) -> _Version | None:
        try:
            stat = os.stat(self.directory / name)
        except OSError:
            return None  # gone
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _changed(self, paths: Iterable[str]) -> list[tuple[str, _Version]]:
        """Return name and version of the image files with new content, the newest first."""
        changed = []
        for name in {Path(path).name for path in paths}:
            if name.startswith(".") or Path(name).suffix.lower() not in self._endings:
                continue
            version = self._version(name)
            if version is not None and self._known.get(name) != version:
                changed.append((name, version))
        return sorted(changed, key=lambda entry: (entry[1][2], entry[0]), reverse=True)


def _return_image(image: Image.Image) -> Image.Image:
    return image


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError as error:
        raise MachineError(f"--directory needs watchfiles ({error}); install it with: {install_hint('watch')}") from error
    return watchfiles
