"""Frames of a camera that answers each HTTP request with one image."""

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
from .frames import Frame, SourceGone

_TIMEOUT_SECONDS, _WHOLE_SECONDS = 10.0, 30.0  # without a byte; for an image
_LARGEST_BYTES = 64 << 20


class _Refused(urllib.request.BaseHandler):
    """Closes the answer that wants a password, before those who know one ask again, which leave it open."""

    handler_order = 0

    def http_error_401(self, request: Any, response: Any, code: int, message: str, headers: Any) -> None:
        response.close()


class Snapshots:
    """An http(s) URL that may answer with an image."""

    def __init__(self, url: str, name: str, interval_s: float) -> None:
        """Take a URL, perhaps with user and password, for HTTP's basic or digest authentication.

        Args:
            url: what is asked for.
            name: what messages call it.
            interval_s: between the beginnings of two requests.

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
            _ = parts.port  # which is only now looked at
        except ValueError as error:
            raise InputError(f"{name}: not a URL ({error}); give one such as http://camera.local/snapshot.jpg") from error
        ways = urllib.request.HTTPBasicAuthHandler(users), urllib.request.HTTPDigestAuthHandler(users)
        self._opener = urllib.request.build_opener(_Refused, *ways)

    def answer_images(self) -> bool:
        """Ask once; returns whether one image was the answer, and not a stream.

        Raises:
            SourceGone: nobody answers, or an error. InputError: a web page is the answer.
        """
        try:
            with self._opened() as response:
                return self._is_image(response)
        except http.client.HTTPException:
            return False  # something that is nearly HTTP, as some streams are
        except OSError as error:
            raise self._gone(error) from error

    def frames(self, stop: threading.Event) -> Iterator[Frame]:
        """See `FrameSource`. A frame counts as captured when it has come whole."""
        tell(f"watching {self.name}, one image every {self._interval_s:g} s")
        number = 0
        while not stop.is_set():
            began = time.perf_counter()
            image = self._image(number)
            number += 1
            yield Frame(number, None, time.perf_counter(), functools.partial(load_image, image, name=self.name))
            del image  # not kept while the next one is waited for
            stop.wait(max(0.0, began + self._interval_s - time.perf_counter()))

    def _image(self, number: int) -> bytes:
        """Return what is answered; whether it is an image shows when it is decoded. Raises SourceGone."""
        body, until = bytearray(), time.monotonic() + _WHOLE_SECONDS
        try:
            with self._opened() as response:
                while piece := response.read1(1 << 16):
                    body += piece
                    if len(body) > _LARGEST_BYTES:
                        raise SourceGone(f"{self.name}: answers more than {_LARGEST_BYTES >> 20} MiB; check its address")
                    if time.monotonic() > until:
                        raise SourceGone(f"{self.name}: an image takes longer than {_WHOLE_SECONDS:.0f} s; check its network")
        except (OSError, http.client.HTTPException) as error:
            raise self._gone(error, number) from error
        return bytes(body)

    def _opened(self) -> Any:
        request = urllib.request.Request(self._url, headers={"User-Agent": "cobra-edge", "Accept": "image/*, */*;q=0.5"})
        return self._opener.open(request, timeout=_TIMEOUT_SECONDS)

    def _is_image(self, response: Any) -> bool:
        """Whether an answer is one image, by its type, or by its first bytes where the type says nothing."""
        kind = response.headers.get_content_type()
        if kind == "text/html":
            raise InputError(f"{self.name}: answers with a web page; give the address of its stream or of its snapshot")
        if kind.startswith(("image/", "multipart/", "video/")):
            return bool(kind.startswith("image/"))
        return image_format(response.read1(64)) is not None

    def _gone(self, error: Exception, number: int = 0) -> SourceGone:
        after = f" after {number} frames" if number else ""
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            advice = "give its user and password: http://user:password@…" if error.code == 401 else "check its address"
            return SourceGone(f"{self.name}: answers {error.code} ({error.reason}){after}; {advice}")
        reason = getattr(error, "reason", None) or error
        return SourceGone(f"{self.name}: cannot be reached{after} ({reason}); check its address and its network")
