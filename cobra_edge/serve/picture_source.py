"""From what a request says its picture is to the bytes of a picture's file; nothing is decoded but its header."""

from __future__ import annotations

import base64
import io

from PIL import Image, UnidentifiedImageError

from ..image import DAMAGED, FORMATS
from .event_loop import off_the_loop
from .fetching import Fetcher
from .limits import Limits
from .refusals import Refusal

# Without TIFF: libtiff writes to stderr what it thinks of a damaged file, and so any client could fill the server's log.
_FORMATS = tuple(name for name in FORMATS if name != "TIFF")
_SPACE = b" \t\r\n\f"
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%20": b"", b"%09": b"", b"%0D": b"", b"%0A": b""}
_ACCEPTED = "send it as data:image/png;base64,..."


class PictureSource:
    """Reads pictures: those inside a request, and, where the operator allows hosts, those a request names."""

    def __init__(self, limits: Limits, fetcher: Fetcher | None) -> None:
        self._limits = limits
        self._fetcher = fetcher

    async def read(self, url: str) -> bytes:
        """Return the bytes of a picture's file, of a known format and no more pixels than the limits say.

        Args:
            url: `data:image/...;base64,...`, or http(s) where a fetcher allows it.

        Raises:
            Refusal: 400 for what is no picture or no such URL, 413 for a picture that is too large.
        """
        scheme = url[:16].partition(":")[0].lower()
        if scheme == "data":
            return await off_the_loop(len(url), self._inside, url)
        if scheme not in ("http", "https"):
            raise _bad_url(f"got {url[:40]!r}; {_ACCEPTED}")
        if self._fetcher is None:
            raise _bad_url(f"this server fetches no pictures; {_ACCEPTED}, or start it with --allow-image-host")
        file = await self._fetcher.fetch(url)
        return await off_the_loop(len(file), self._picture, file)

    def _inside(self, url: str) -> bytes:
        """Return what a data URI has inside.

        Source: RFC 2397
        """
        head, comma, text = url[len("data:") :].partition(",")
        kind, *parameters = [part.strip().lower() for part in head.split(";")]
        if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
            raise _bad_url(f"the data URI begins with {url[:40]!r}; {_ACCEPTED}")
        try:
            encoded = text.encode("ascii")
        except UnicodeError as error:
            raise _damaged("its base64 has characters that base64 does not have") from error
        encoded = _unescaped(encoded).translate(None, _SPACE)
        size = len(encoded) // 4 * 3 - encoded[-2:].count(b"=")
        if size > self._limits.picture_bytes:
            raise _too_large(f"{size:,} bytes, at most {self._limits.picture_bytes:,} are read")
        try:
            file = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise _damaged(f"its base64 is broken ({error})") from error
        return self._picture(file)

    def _picture(self, file: bytes) -> bytes:
        """Return the file, after a look at its header."""
        limit = self._limits.picture_pixels
        try:
            with Image.open(io.BytesIO(file), formats=_FORMATS) as picture:
                width, height = picture.size
        except UnidentifiedImageError as error:
            raise _damaged(f"it is none of {', '.join(_FORMATS)}") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise _too_large(f"more than {limit:,} pixels") from error
        except DAMAGED as error:
            raise _damaged(f"its header is damaged ({type(error).__name__})") from error
        if width * height > limit:
            raise _too_large(f"{width} × {height} pixels, at most {limit:,} are read")
        return file


def _unescaped(encoded: bytes) -> bytes:
    """Return base64 without the escapes that it may have in a URL. Others break it: a letter needs none.

    Not urllib's `unquote_to_bytes`, which takes a hundred times a text's memory where all of it is escaped.
    """
    for escape, meant in _ESCAPES.items() if b"%" in encoded else ():
        encoded = encoded.replace(escape, meant).replace(escape.lower(), meant)
    return encoded


def _bad_url(why: str) -> Refusal:
    return Refusal(400, f"the picture's address: {why}", "invalid_image_url", "messages")


def _damaged(why: str) -> Refusal:
    return Refusal(400, f"the picture cannot be read: {why}; {_ACCEPTED}", "invalid_image", "messages")


def _too_large(got: str) -> Refusal:
    return Refusal(413, f"the picture has {got}; scale it down", "image_too_large", "messages")
