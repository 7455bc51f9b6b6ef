"""Frame source for a camera with a snapshot URL: each HTTP request returns one image."""

from __future__ import annotations

import functools
import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from ..errors import InputError
from ..inputs.image import load_image
from ..inputs.image_format import image_format
from ..terminal.output import tell
from .source import Frame, SourceLost

_TIMEOUT_SECONDS, _WHOLE_SECONDS = 10.0, 30.0  # without data; for a whole image
_MAX_BYTES = 64 << 20


class _CloseOn401(urllib.request.BaseHandler):
    """Closes a 401 response before the authentication handlers repeat the request, which leave it open."""

    handler_order = 0

    def http_error_401(self, request: Any, response: Any, code: int, message: str, headers: Any) -> None:
        response.close()


class Snapshots:
    """An http(s) URL that may return an image."""

    def __init__(self, url: str, name: str, interval_s: float) -> None:
        """Parse a URL, optionally with user and password for basic or digest authentication.

        Args:
            url: of the snapshot.
            name: of the source in messages.
            interval_s: between the starts of two requests.

        Raises:
            InputError: the URL is malformed.
        """
        self.name, self._interval_s = name, interval_s
        try:
            parts = urlsplit(url)
            host = parts.netloc.rpartition("@")[2]
            self._url = urlunsplit((parts.scheme, host, parts.path or "/", parts.query, ""))
            users = urllib.request.HTTPPasswordMgrWithDefaultRealm()
            if parts.username is not None:
                users.add_password(None, self._url, unquote(parts.username), unquote(parts.password or ""))
            _ = parts.port  # raises for an invalid port
        except ValueError as error:
            raise InputError(f"{name}: not a URL ({error}); give one such as http://camera.local/snapshot.jpg") from error
        ways = urllib.request.HTTPBasicAuthHandler(users), urllib.request.HTTPDigestAuthHandler(users)
        self._opener = urllib.request.build_opener(_CloseOn401, *ways)

    def answer_images(self) -> bool:
        """Send one request; returns whether the response is an image, and not a stream.

        Raises:
            SourceLost: no response, or an HTTP error.
            InputError: the response is a web page.
        """
        try:
            with self._open() as response:
                return self._is_image(response)
        except http.client.HTTPException:
            return False  # nearly HTTP, like some streams
        except OSError as error:
            raise self._lost(error) from error

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. The capture time is when the image is complete."""
        tell(f"watching {self.name}, one image every {self._interval_s:g} s")
        number = 0
        while not stop.is_set():
            began = time.perf_counter()
            image = self._image(number)
            number += 1
            yield Frame(number, None, time.perf_counter(), functools.partial(load_image, image, name=self.name))
            del image  # not kept while waiting for the next frame
            stop.wait(max(0.0, began + self._interval_s - time.perf_counter()))

    def _image(self, number: int) -> bytes:
        """Return the body of a response, not decoded. Raises SourceLost."""
        body, until = bytearray(), time.monotonic() + _WHOLE_SECONDS
        try:
            with self._open() as response:
                while piece := response.read1(1 << 16):
                    body += piece
                    if len(body) > _MAX_BYTES:
                        raise SourceLost(f"{self.name}: the response exceeds {_MAX_BYTES >> 20} MiB; check its URL")
                    if time.monotonic() > until:
                        raise SourceLost(f"{self.name}: an image takes more than {_WHOLE_SECONDS:.0f} s; check its network")
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error, number) from error
        return bytes(body)

    def _open(self) -> Any:
        request = urllib.request.Request(self._url, headers={"User-Agent": "cobra-edge", "Accept": "image/*, */*;q=0.5"})
        return self._opener.open(request, timeout=_TIMEOUT_SECONDS)

    def _is_image(self, response: Any) -> bool:
        """Whether a response is one image, by its content type, else by its first bytes."""
        kind = response.headers.get_content_type()
        if kind == "text/html":
            raise InputError(f"{self.name}: returns a web page; give the URL of its stream or snapshot")
        if kind.startswith(("image/", "multipart/", "video/")):
            return bool(kind.startswith("image/"))
        return image_format(response.read1(64)) is not None

    def _lost(self, error: Exception, number: int = 0) -> SourceLost:
        after = f" after {number} frames" if number else ""
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            advice = "give user and password: http://user:password@…" if error.code == 401 else "check its URL"
            return SourceLost(f"{self.name}: returns status {error.code} ({error.reason}){after}; {advice}")
        reason = getattr(error, "reason", None) or error
        return SourceLost(f"{self.name}: cannot be reached{after} ({reason}); check its URL and network")
