"""Decodes data: URLs and plain base64.

All variants of base64 that clients send are accepted: without padding, URL-safe, in lines, percent-encoded. The media type of
the URL is ignored: the format is detected from the bytes.

Source: RFC 2397 (data: URLs), RFC 4648 (base64), RFC 2045 (base64 in lines)
"""

from __future__ import annotations

import base64
import re

from .errors import ApiError

_SPACE = b" \t\r\n\f"
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%20": b"", b"%09": b"", b"%0D": b"", b"%0A": b""}
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/]")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
ACCEPTED = "send it as data:image/png;base64,..."


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case; "" where there is no colon, as in plain base64."""
    scheme, colon, _ = url.lstrip()[:16].partition(":")
    return scheme.lower() if colon else ""


def decode_image_url(url: str, max_bytes: int) -> bytes:
    """Return the content of a data: URL or of plain base64.

    Raises:
        ApiError: 400 for neither, 413 for more than `max_bytes`, before decoding.
    """
    text = url
    if scheme_of(url) == "data":
        head, comma, text = url.partition(",")
        if not comma or "base64" not in [part.strip().lower() for part in head.split(";")[1:]]:
            raise bad_image_url(f"the data: URL begins with {url[:40]!r}, without ;base64, before its data; {ACCEPTED}")
    try:
        encoded = text.encode("ascii")
    except UnicodeError as error:
        raise _broken("has characters that are not ASCII") from error
    encoded = _unescaped(encoded).translate(_URL_SAFE, _SPACE).rstrip(b"=")
    foreign = _FOREIGN.search(encoded)
    if foreign is not None:
        raise _broken(f"has {foreign[0].decode()!r} at character {foreign.start()}")
    if len(encoded) % 4 == 1 or not encoded:
        raise _broken(f"has {len(encoded):,} characters, which is not a whole number of bytes")
    size = len(encoded) * 3 // 4
    if size > max_bytes:
        raise ApiError(
            413, f"the image has {size:,} bytes, the maximum is {max_bytes:,}; scale it down", "image_too_large", "messages"
        )
    return base64.b64decode(encoded + b"=" * (-len(encoded) % 4))


def bad_image_url(why: str) -> ApiError:
    """Return the error of an invalid image URL."""
    return ApiError(400, f"image URL: {why}", "invalid_image_url", "messages")


def _broken(why: str) -> ApiError:
    return ApiError(400, f"the image cannot be read: its base64 {why}; {ACCEPTED}", "invalid_image", "messages")


def _unescaped(encoded: bytes) -> bytes:
    """Decode percent-encoding of the characters that base64 needs it for.

    urllib's `unquote_to_bytes` takes a hundred times the memory of a text that is escaped throughout.
    """
    for escape, meant in _ESCAPES.items() if b"%" in encoded else ():
        encoded = encoded.replace(escape, meant).replace(escape.lower(), meant)
    return encoded
