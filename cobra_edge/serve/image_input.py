"""From the image URL of a request to the content of the image file."""

from __future__ import annotations

from .errors import ApiError
from .event_loop import off_loop
from .image_fetcher import Fetcher
from .image_url import ACCEPTED, bad_image_url, decode_image_url, scheme_of
from .limits import Limits

_MIN_BASE64_CHARACTERS = 40  # no image has fewer characters; file names do, and may look like base64


class ImageInput:
    """Reads images inside requests and, from allowed hosts, by URL."""

    def __init__(self, limits: Limits, fetcher: Fetcher | None) -> None:
        self._limits = limits
        self._fetcher = fetcher

    async def read(self, url: str) -> bytes:
        """Return the content of an image file, untrusted.

        Args:
            url: `data:...;base64,...`, plain base64, or http(s) where a fetcher allows it.

        Raises:
            ApiError: 400 not such a URL, 413 the file is too large.
        """
        scheme = scheme_of(url)
        if scheme == "data":
            return await self._decode(url)
        if not scheme and len(url) >= _MIN_BASE64_CHARACTERS:
            try:
                return await self._decode(url)
            except ApiError as error:
                if error.status == 413:
                    raise
        if scheme not in ("http", "https"):
            raise bad_image_url(f"got {url[:40]!r}, which is neither a data: URL nor base64; {ACCEPTED}")
        if self._fetcher is None:
            raise bad_image_url(f"this server does not fetch images; {ACCEPTED}, or start it with --allow-image-host")
        return await self._fetcher.fetch(url.strip())

    async def _decode(self, url: str) -> bytes:
        return await off_loop(len(url), decode_image_url, url, self._limits.image_bytes)
