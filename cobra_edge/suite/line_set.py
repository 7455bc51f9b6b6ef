"""A set of lines with the directory of their images, and its division into two sets that share no image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .line import Line
from .reader import CALIBRATION, MORE_CALIBRATION, read_suite

FEWEST_TO_DIVIDE = 16  # images: half of them are held out, as few as drift can be judged on
_ONE_IN, _FEWEST_HELD_OUT, _MOST_HELD_OUT = 5, 8, 16
_SEED = "held out"  # put before what decides which images are held out


@dataclass(frozen=True, eq=False)
class LineSet:
    """Lines of a data set.

    Attributes:
        name: of the file or folder, for messages.
        lines: in order; in calibration data an answer may be "".
        directory: that image paths are relative to.
    """

    name: str
    lines: Sequence[Line]
    directory: Path

    @classmethod
    def of_suite(cls, file: Path) -> LineSet:
        """Read a suite; every line needs an answer. Raises InputError as `read_suite`."""
        return cls(file.name, read_suite(file), file.parent)

    @classmethod
    def embedded(cls, *, more: bool = False) -> LineSet:
        """Return the embedded calibration set; `more` adds the images that guided methods gain by."""
        found = cls.of_suite(CALIBRATION)
        return replace(found, lines=[*found.lines, *read_suite(MORE_CALIBRATION)]) if more else found

    def images(self) -> list[Path]:
        """Return every image once, in order."""
        return [self.directory / name for name in dict.fromkeys(line.image for line in self.lines) if name is not None]

    def about(self, most_images: int) -> LineSet:
        """Return the lines about at most so many images, evenly spaced, and those without an image."""
        images = list(dict.fromkeys(line.image for line in self.lines if line.image is not None))
        if len(images) <= most_images:
            return self
        kept = {None, *(images[i * len(images) // most_images] for i in range(most_images))}
        return replace(self, lines=[line for line in self.lines if line.image in kept])

    def divided(self) -> tuple[LineSet, LineSet]:
        """Return the lines to calibrate on, and those of held-out images: 1 in 5 images, at least 8 and at most 16.

        Images are chosen by a hash of their content, so that copies of an image stay together, and a set that grows keeps most
        of its division. Lines without an image are not held out. With fewer than FEWEST_TO_DIVIDE different images nothing is.
        """
        hashes = {name: _hash(self.directory / name) for name in {line.image for line in self.lines} if name is not None}
        order = sorted(set(hashes.values()))
        wanted = 0 if len(order) < FEWEST_TO_DIVIDE else max(_FEWEST_HELD_OUT, min(len(order) // _ONE_IN, _MOST_HELD_OUT))
        chosen = {name for name, digest in hashes.items() if digest in order[:wanted]}
        kept, held = ([line for line in self.lines if (line.image in chosen) is side] for side in (False, True))
        return replace(self, lines=kept), replace(self, lines=held)


def _hash(image: Path) -> str:
    return hashlib.sha256(_SEED.encode() + image.read_bytes()).hexdigest()
