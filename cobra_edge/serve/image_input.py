"""From what a request says its image is to the bytes of the image's file; nothing of it is looked at."""

from __future__ import annotations

from .errors import Refusal
from .event_loop import off_loop
from .image_fetcher import Fetcher
from .image_url import ACCEPTED, bad_image_url, decode_image_url, scheme_of
from .limits import Limits

_SHORTEST_BASE64 = 40  # no image has fewer characters, but names and paths of files have, which are of the same letters


class ImageInput:
    """Reads images: those inside a request, and, where the operator allows hosts, those a request names."""

    def __init__(self, limits: Limits, fetcher: Fetcher | None) -> None:
        self._limits = limits
        self._fetcher = fetcher

    async def read(self, url: str) -> bytes:
        """Return the bytes of an image's file, of any content.

        Args:
            url: `data:...;base64,...`, base64 alone, or http(s) where a fetcher allows it.

        Raises:
            Refusal: 400 for what is no such URL, 413 for a file that is too large.
        """
        scheme = scheme_of(url)
        if scheme == "data":
            return await self._inside(url)
        if not scheme and len(url) >= _SHORTEST_BASE64:
            try:
                return await self._inside(url)
            except Refusal as refusal:
                if refusal.status == 413:
                    raise
        if scheme not in ("http", "https"):
            raise bad_image_url(f"got {url[:40]!r}, which is neither a data: URL nor base64; {ACCEPTED}")
        if self._fetcher is None:
            raise bad_image_url(f"this server fetches no images; {ACCEPTED}, or start it with --allow-image-host")
        return await self._fetcher.fetch(url.strip())

    async def _inside(self, url: str) -> bytes:
        return await off_loop(len(url), decode_image_url, url, self._limits.image_bytes)
