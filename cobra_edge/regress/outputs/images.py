"""Images in a page: data URIs of PNG or JPEG, small enough that a page with a dozen of them can be mailed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import InputError
from ...inputs.image import load_image
from ...terminal.output import plain

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_KEEP_BYTES, _SIDE, _QUALITY = 72_000, 512, 80  # larger files, and other formats, are shown as a small JPEG


@dataclass(frozen=True)
class EmbeddedImage:
    """An image for a page: its data URI, or the reason why there is none; width and height in pixels as displayed."""

    uri: str | None
    why_not: str = ""
    width: int = 0
    height: int = 0


def embed_image(name: str, images: Mapping[str, bytes]) -> EmbeddedImage:
    """Return an image for a page; of a missing or damaged one, the reason.

    The type is derived from the content, not from the name; decoding it here ensures that a browser can.
    """
    content = images.get(name)
    if content is None:
        return EmbeddedImage(None, f"the image {plain(name)} is missing")
    try:
        image = load_image(content)
    except InputError as error:
        return EmbeddedImage(None, f"the image {plain(name)} cannot be shown: {plain(str(error))}")
    kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None or len(content) > _KEEP_BYTES:
        image.thumbnail((_SIDE, _SIDE))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=_QUALITY)
        content, kind = stream.getvalue(), "jpeg"
    return EmbeddedImage(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", "", *image.size)
