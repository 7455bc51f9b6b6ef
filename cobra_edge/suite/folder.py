"""Calibration data from a folder of images: each gets prompts of several kinds from the shipped list."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError
from ..files.parsing import parse_toml
from ..inputs.image import load_image
from ..inputs.image_format import image_endings
from ..terminal.output import stages, tell
from .line import Line
from .line_set import LineSet

PROMPTS = Path(__file__).with_name("prompts.toml")
MOST_IMAGES = 200  # more hardly change what calibration finds, and each takes as long as the first
ADVISABLE_IMAGES = 32
_TEXT = "text"  # kind of the prompts that need no image
_PROMPTS_PER_IMAGE, _IMAGES_PER_TEXT = 4, 8
_NAMED = 5  # unreadable images in a message
_SEED = "prompts"  # put before what decides the order of prompts and of images


def read_folder(folder: Path, *, skip_bad: bool = False) -> LineSet:
    """Make calibration lines, without answers, of a folder of images.

    Images are searched in subfolders too, hidden ones apart; links out of the folder are not followed. At most MOST_IMAGES are
    used, chosen by their names. Which prompts an image gets depends on the number of images and a fixed seed.

    Args:
        folder: of images.
        skip_bad: leave out images that cannot be read, with one line that counts them.

    Raises:
        InputError: no image, or one that cannot be read; the message counts and names them.
    """
    names, outside = _image_names(folder)
    if not names:
        links = f" ({outside} links lead out of it and are not followed; copy the images)" if outside else ""
        raise InputError(f"{folder}: no images{links}; expected a folder with files such as .jpg or .png, 32 or more")
    chosen = sorted(sorted(names, key=_order)[:MOST_IMAGES])
    if len(chosen) < len(names):
        tell(f"{folder}: {len(chosen)} of its {len(names)} images are used, chosen by name")
    bad = dict[str, str]()
    with stages() as on_step:
        for index, name in enumerate(chosen):
            on_step("read images", index, len(chosen))
            if flaw := _flaw(folder / name):
                bad[name] = flaw
    if bad and (not skip_bad or len(bad) == len(chosen)):
        raise InputError(f"{folder}: {_counted(bad, chosen)}; remove them" + ("" if skip_bad else ", or give --skip-bad"))
    if bad:
        tell(f"{folder}: {_counted(bad, chosen)}; left out")
    good = [name for name in chosen if name not in bad]
    if len(good) < ADVISABLE_IMAGES:
        advice = f"at least {ADVISABLE_IMAGES} are advisable, as varied as those that the model will see"
        tell(f"{folder}: {len(good)} images; {advice}", "yellow")
    return LineSet(folder.name, list(prompted_lines(good)), folder)


def _image_names(folder: Path) -> tuple[list[str], int]:
    """Return the paths of images relative to the folder, and how many links to files outside it were found."""
    inside, endings, found, outside = folder.resolve(), image_endings(), list[str](), 0
    for parent, directories, files in os.walk(folder):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() not in endings:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                outside += 1
            else:
                found.append(path.relative_to(folder).as_posix())
    return found, outside


def _flaw(image: Path) -> str | None:
    try:
        load_image(image, name=image.name)
    except InputError as error:
        return str(error)
    return None


def _counted(bad: dict[str, str], chosen: Sequence[str]) -> str:
    named = "; ".join(list(bad.values())[:_NAMED]) + ("; …" if len(bad) > _NAMED else "")
    return f"{len(bad)} of {len(chosen)} images cannot be read: {named}"


def prompted_lines(images: Sequence[str]) -> Iterator[Line]:
    """Yield lines without answers about images by name, of different kinds for each, and then lines without an image."""
    prompts = {kind: itertools.cycle(sorted(of_kind, key=_order)) for kind, of_kind in read_prompts().items()}
    texts, kinds = prompts.pop(_TEXT), itertools.cycle(sorted(prompts, key=_order))
    for image in images:
        for kind in itertools.islice(kinds, _PROMPTS_PER_IMAGE):
            yield Line(next(prompts[kind]), task=kind, image=image)
    for _ in range(-(-len(images) // _IMAGES_PER_TEXT)):
        yield Line(next(texts), task=_TEXT)


def read_prompts() -> dict[str, list[str]]:
    """Return the shipped prompts by kind."""
    return parse_toml(PROMPTS.read_bytes())


def _order(text: str) -> bytes:
    """Return the key of a fixed random order."""
    return hashlib.sha256(f"{_SEED}:{text}".encode("utf-8", "surrogateescape")).digest()
