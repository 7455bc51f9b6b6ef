"""Frames as picture files that appear in a directory, or are written anew there."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError, MachineError
from ..image import FORMATS, load_picture
from ..requirements import install_hint
from ..terminal import tell
from .frames import Frame

log = logging.getLogger(__name__)

_STEP_MS, _LONGEST_MS = 10, 100  # changes are gathered until none comes for a step
_TICK_MS = 200  # how often it is looked whether the directory is still there
_KNOWN_FILES = 1024

_Version = tuple[int, int, int]  # inode, size, mtime: what changes when a file is written anew


class PictureDirectory:
    """A directory into which pictures are written, by a camera's software perhaps; hidden files are not looked at."""

    def __init__(self, directory: Path) -> None:
        """Check that it can be watched.

        Raises:
            InputError: no such directory. MachineError: the library is missing.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give one into which pictures are written")
        self.directory = directory
        self._watchfiles = _watchfiles()
        self._endings = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
        self._known: OrderedDict[str, _Version] = OrderedDict()  # files that were a frame, and as what

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. A frame counts as captured when it was noticed that its file is there, or has changed."""
        number, begun = 0, False
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
                raise MachineError(f"{self.directory}: went away after {number} pictures; watch it again when it is back")
            if not begun:  # from now on nothing is missed
                tell(f"watching {self.directory}")
                begun = True
            newest = self._newest(name for change, name in changes if change != self._watchfiles.Change.deleted)
            if newest is not None:
                name, picture, older = newest
                number += older + 1
                yield Frame(number, name, noticed, functools.partial(_same, picture))
                del picture, newest  # not kept while the next one is waited for

    def _newest(self, paths: Iterable[str]) -> tuple[str, Image.Image, int] | None:
        """Return the newest whole picture among files that changed, and how many older ones there are; None for none."""
        found: tuple[str, Image.Image] | None = None
        older = 0
        for name, version in self._changed(paths):
            if found is not None:
                older += 1
            elif (picture := self._whole(name, version)) is not None:
                found = name, picture
            else:
                continue
            self._known[name] = version
            self._known.move_to_end(name)
        while len(self._known) > _KNOWN_FILES:
            self._known.popitem(last=False)
        return None if found is None else (*found, older)

    def _whole(self, name: str, version: _Version) -> Image.Image | None:
        """Decode a file; None where it cannot be decoded, half written perhaps, or was written to meanwhile.

        Nothing is lost: it changes again when it is finished, and is looked at then.
        """
        try:
            picture = load_picture(self.directory / name)
        except InputError as error:
            log.info("passed over: %s", error)
            return None
        return picture if self._version(name) == version else None

    def _version(self, name: str) -> _Version | None:
        try:
            stat = os.stat(self.directory / name)
        except OSError:
            return None  # gone again
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    def _changed(self, paths: Iterable[str]) -> list[tuple[str, _Version]]:
        """Return the picture files among the paths whose content was written, newest first."""
        changed = []
        for name in {Path(path).name for path in paths}:
            if name.startswith(".") or Path(name).suffix.lower() not in self._endings:
                continue
            version = self._version(name)
            if version is not None and self._known.get(name) != version:
                changed.append((name, version))
        return sorted(changed, key=lambda entry: (entry[1][2], entry[0]), reverse=True)


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _watchfiles() -> Any:
    try:
        import watchfiles
    except ImportError as error:
        raise MachineError(f"--directory needs watchfiles ({error}); install it with: {install_hint('watch')}") from error
    return watchfiles
