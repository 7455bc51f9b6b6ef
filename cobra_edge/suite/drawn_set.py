"""Calibration lines about drawn images, for models of photographs and a user who gives no images.

The images are drawn once, into the user's cache, and asked the prompts that a folder of images would be.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from ..terminal.output import stages
from .drawn_images import VERSION, drawn_image
from .folder import prompted_lines
from .line_set import LineSet


def drawn_set(count: int) -> LineSet:
    """Return lines without answers about the first `count` drawn images, drawing those that the cache lacks.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = platformdirs.user_cache_path("cobra_edge") / f"drawn-images-{VERSION}"
    names = [f"{index:03}.png" for index in range(count)]
    missing = [(index, name) for index, name in enumerate(names) if not (folder / name).is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with stages() as on_step:
            for done, (index, name) in enumerate(missing):
                on_step("draw images to calibrate on", done, len(missing))
                _draw(index, folder / name)
    return LineSet("drawn images", list(prompted_lines(names)), folder)


def _draw(index: int, file: Path) -> None:
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    drawn_image(index).save(staged, "png")
    os.replace(staged, file)
