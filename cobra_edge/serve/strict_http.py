"""HTTP/1.1 without the forms that two programs read as different requests ("request smuggling").

A proxy in front may find the end of a request somewhere else than h11 does; what follows is then a request that the proxy never
saw. So whatever can be read in two ways is refused, and its connection closed.

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
    """An h11 connection that refuses ambiguous requests.

    Attributes:
        refused: why the last request was, or "" where h11 itself refused it.
    """

    refused = ""

    def next_event(self) -> Any:
        """Return the next event. Raises h11.RemoteProtocolError for a request that is none, or ambiguous."""
        before = self.trailing_data[0]
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.refused = ambiguity(before, event.http_version) or ""
        elif isinstance(event, h11.EndOfMessage):
            end = before[: len(before) - len(self.trailing_data[0])]  # the last chunk, and trailers
            self.refused = "a line at the end of its chunks ends in LF without CR" if _BARE_LF.search(end) else ""
        if self.refused:
            raise h11.RemoteProtocolError(self.refused)
        return event


def ambiguity(received: bytes, version: bytes) -> str | None:
    """Return what of a request programs read differently, or None.

    Args:
        received: bytes that begin with the request's head, as they came, of which h11 made a request.
        version: of HTTP, as the request says.
    """
    found = _HEAD.match(received)
    head = b"" if found is None else found[0]
    if _BARE_LF.search(head):
        return "a line of its head ends in LF without CR"
    if _FOLDED.search(head):
        return "a header goes on in a second line"
    headers = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])]
    lengths = [length for name, value in headers if name == b"content-length" for length in value.split(b",")]
    if len(lengths) > 1:
        return "it has more than one Content-Length"
    if any(name == b"transfer-encoding" for name, _ in headers):
        if lengths:
            return "it has both Content-Length and Transfer-Encoding"
        if version != b"1.1":
            return "it has a Transfer-Encoding, which is HTTP/1.1's alone"
    return None
