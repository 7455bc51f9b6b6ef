"""Pictures inside a page: data URIs of their real type, small enough that a page with a dozen can be sent around."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from ...image import MAX_PIXELS
from ...terminal import plain

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG"}
_KEEP_BYTES, _SIDE, _QUALITY = 72_000, 512, 80  # what is larger is shown smaller, as JPEG


@dataclass(frozen=True)
class Shown:
    """A picture for a page: its data URI, or why there is none; width and height in pixels of what is embedded."""

    uri: str | None
    why_not: str = ""
    width: int = 0
    height: int = 0


def shown_picture(name: str, pictures: Mapping[str, bytes]) -> Shown:
    """Return a picture for a page. One that is missing, of another type or damaged is not shown, and says why."""
    content = pictures.get(name)
    if content is None:
        return Shown(None, f"the picture {plain(name)} is not here")
    kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
    if kind is None:
        return Shown(None, f"the picture {plain(name)} is neither PNG nor JPEG and is not shown")
    try:
        return _embedded(content, kind)
    except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as error:
        return Shown(None, f"the picture {plain(name)} cannot be shown: {plain(str(error))}")


def _embedded(content: bytes, kind: str) -> Shown:
    """Decode the picture, which is what shows that a browser could; raises what pillow does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=[kind]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
            picture.load()
            if len(content) > _KEEP_BYTES:
                small = picture.convert("RGB")
                small.thumbnail((_SIDE, _SIDE))
                stream = io.BytesIO()
                small.save(stream, "JPEG", quality=_QUALITY)
                content, kind, size = stream.getvalue(), "JPEG", small.size
            else:
                size = picture.size
    return Shown(f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}", "", *size)
