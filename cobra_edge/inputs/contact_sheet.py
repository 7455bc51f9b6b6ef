"""Several images as one: a numbered contact sheet, for a model that sees one image."""

from __future__ import annotations

import math
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

MOST_IMAGES = 16
_BACKGROUND, _INK = (128, 128, 128), (255, 255, 255)
_LABEL = 0.16  # of a cell's width


def contact_sheet(images: Iterable[Image.Image], count: int, size: int) -> Image.Image:
    """Return a square sheet: rows of images in order, each scaled to fit its cell and numbered from 1 in its corner.

    Each image keeps 1 / columns of the width and height that it would have alone: of four, a quarter of the pixels.

    Args:
        images: RGB; taken one after the other, so that only one is held in full.
        count: how many there are.
        size: of the sheet in pixels, that of the model's input.
    """
    columns = math.ceil(math.sqrt(count))
    cell = size // columns
    sheet = Image.new("RGB", (size, size), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(8, round(_LABEL * cell)))
    for index, image in enumerate(images):
        fitted = image.copy()
        fitted.thumbnail((cell, cell))
        left, top = index % columns * cell, index // columns * cell
        sheet.paste(fitted, (left + (cell - fitted.width) // 2, top + (cell - fitted.height) // 2))
        label = str(index + 1)
        box = draw.textbbox((left + 1, top), label, font=font)
        draw.rectangle((left, top, box[2] + 1, box[3] + 1), fill=(0, 0, 0))
        draw.text((left + 1, top), label, fill=_INK, font=font)
    return sheet
