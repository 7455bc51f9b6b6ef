"""From the address of an image in a request to the bytes of its file: what is inside a data: URL, or in base64 alone.

Clients write base64 in many ways: without padding, in the alphabet for URLs, in lines, escaped as in a URL. All are read. What
the URL says of the file's type is not looked at, since the bytes say it themselves.

Source: RFC 2397 (data: URLs), RFC 4648 (base64), RFC 2045 (base64 in lines)
"""

from __future__ import annotations

import base64
import re

from .errors import Refusal

_SPACE = b" \t\r\n\f"
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%20": b"", b"%09": b"", b"%0D": b"", b"%0A": b""}
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/]")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
ACCEPTED = "send it as data:image/png;base64,..."


def scheme_of(url: str) -> str:
    """Return what stands before the colon of a URL, in lower case; "" where there is no colon, as in base64 alone."""
    scheme, colon, _ = url.lstrip()[:16].partition(":")
    return scheme.lower() if colon else ""


def decode_image_url(url: str, max_bytes: int) -> bytes:
    """Return the file inside a data: URL, or inside base64 that stands alone.

    Raises:
        Refusal: 400 for what is neither, 413 for more than `max_bytes`, before they are decoded.
    """
    text = url
    if scheme_of(url) == "data":
        head, comma, text = url.partition(",")
        if not comma or "base64" not in [part.strip().lower() for part in head.split(";")[1:]]:
            raise bad_image_url(f"the data: URL begins with {url[:40]!r}, without ;base64, before its data; {ACCEPTED}")
    try:
        encoded = text.encode("ascii")
    except UnicodeError as error:
        raise _broken("has characters that base64 does not have") from error
    encoded = _unescaped(encoded).translate(_URL_SAFE, _SPACE).rstrip(b"=")
    foreign = _FOREIGN.search(encoded)
    if foreign is not None:
        raise _broken(f"has {foreign[0].decode()!r} at character {foreign.start()}")
    if len(encoded) % 4 == 1 or not encoded:
        raise _broken(f"has {len(encoded):,} characters, which make no whole bytes")
    size = len(encoded) * 3 // 4
    if size > max_bytes:
        raise Refusal(
            413, f"the image has {size:,} bytes, at most {max_bytes:,} are read; scale it down", "image_too_large", "messages"
        )
    return base64.b64decode(encoded + b"=" * (-len(encoded) % 4))


def bad_image_url(why: str) -> Refusal:
    """Return the refusal of what is no address of an image."""
    return Refusal(400, f"the image's address: {why}", "invalid_image_url", "messages")


def _broken(why: str) -> Refusal:
    return Refusal(400, f"the image cannot be read: its base64 {why}; {ACCEPTED}", "invalid_image", "messages")


def _unescaped(encoded: bytes) -> bytes:
    """Return base64 without the escapes that it may have in a URL. Others break it: a letter needs none.

    Not urllib's `unquote_to_bytes`, which takes a hundred times a text's memory where all of it is escaped.
    """
    for escape, meant in _ESCAPES.items() if b"%" in encoded else ():
        encoded = encoded.replace(escape, meant).replace(escape.lower(), meant)
    return encoded
