"""Strict HTTP/1.1 parsing, against request smuggling.

A reverse proxy and h11 may disagree on where a request ends; the rest is then a request that the proxy never checked. So an
ambiguous request is rejected and its connection closed.

Source: RFC 9112, sections 2.2, 5.2, 6.1 and 6.3
"""

from __future__ import annotations

import re
from typing import Any

import h11

_HEAD = re.compile(rb".*?\n\r?\n", re.DOTALL)
_BARE_LF = re.compile(rb"(?<!\r)\n")
_FOLDED = re.compile(rb"\n[ \t]")


class StrictConnection(h11.Connection):
    """An h11 connection that rejects ambiguous requests.

    Attributes:
        rejected: why the last request was, or "" where h11 itself rejected it.
    """

    rejected = ""
    _last = b""  # byte that h11 consumed; the CR of a line may have come before its LF

    def next_event(self) -> Any:
        """Return the next event. Raises h11.RemoteProtocolError for a malformed or ambiguous request."""
        before = self.trailing_data[0]
        event = super().next_event()
        end = before[: len(before) - len(self.trailing_data[0])]
        last, self._last = self._last, end[-1:] or self._last
        if isinstance(event, h11.Request):
            self.rejected = ambiguity(before, event.http_version) or ""
        elif isinstance(event, h11.EndOfMessage):
            bare = _BARE_LF.search(last + end, len(last))  # in the last chunk and trailers
            self.rejected = "a line after its last chunk ends in LF without CR" if bare else ""
        if self.rejected:
            raise h11.RemoteProtocolError(self.rejected)
        return event


def ambiguity(received: bytes, version: bytes) -> str | None:
    """Return what is ambiguous in a request, or None.

    Args:
        received: bytes that begin with the request's head, which h11 has accepted.
        version: HTTP version of the request.
    """
    found = _HEAD.match(received)
    head = b"" if found is None else found[0]
    if _BARE_LF.search(head):
        return "a line of its head ends in LF without CR"
    if _FOLDED.search(head):
        return "a header continues on a second line"
    headers = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])]
    lengths = [length for name, value in headers if name == b"content-length" for length in value.split(b",")]
    if len(lengths) > 1:
        return "it has more than one Content-Length"
    if any(name == b"transfer-encoding" for name, _ in headers):
        if lengths:
            return "it has both Content-Length and Transfer-Encoding"
        if version != b"1.1":
            return "it has a Transfer-Encoding, which only HTTP/1.1 allows"
    return None
