"""Lingering close: an error response to a client that is still sending its body.

Where a connection is closed with unread bytes, the kernel resets it, and many clients and proxies lose the response. So what
the client sends is read and discarded for a short time before the connection is closed.

Source: RFC 9112, section 9.6
"""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from .errors import ApiError, error_response

_SECONDS = 2.0
_BYTES = 32 << 20  # beyond, the connection is reset


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send, *, whole: bool = False) -> None:
    """Send an error, and close the connection once the body has been read or the time is up.

    Args:
        error: to send.
        scope, receive, send: of ASGI.
        whole: the body has already been read.
    """
    response = error_response(error, {"Connection": "close"})
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if not whole and error.status != 408 and _expects_body(Headers(scope=scope)):  # a slow client has had its time
        with anyio.move_on_after(_SECONDS):
            await _discard(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _expects_body(headers: Headers) -> bool:
    """Whether the client sends a body of bounded size without waiting for 100 Continue."""
    if "expect" in headers:
        return False
    declared = headers.get("content-length", "")
    return 0 < int(declared) <= _BYTES if declared.isdecimal() else "transfer-encoding" in headers


async def _discard(receive: Receive) -> None:
    size = 0
    while size <= _BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        size += len(message.get("body", b""))
