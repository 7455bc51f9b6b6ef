"""A refusal that reaches a client who is still sending: what it sends is taken, and thrown away, for a moment.

A connection that is closed while bytes of its client lie unread is reset by the system, and a reset takes the answer with it
before many clients, and proxies, have read it.

Source: RFC 9112, section 9.6
"""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from .errors import Refusal, refusal_response

_SECONDS = 2.0
_BYTES = 32 << 20  # of who sends more the connection is reset


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send, *, whole: bool = False) -> None:
    """Send a refusal, and close the connection when the client has sent its body or had its time; `whole`: it has."""
    response = refusal_response(refusal, {"Connection": "close"})
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if not whole and refusal.status != 408 and _will_come(Headers(scope=scope)):  # who was too slow has had its time
        with anyio.move_on_after(_SECONDS):
            await _throw_away(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _will_come(headers: Headers) -> bool:
    """Say whether there is a body, of a size that is waited for, which the client sends without being asked to."""
    if "expect" in headers:
        return False
    declared = headers.get("content-length", "")
    return 0 < int(declared) <= _BYTES if declared.isdecimal() else "transfer-encoding" in headers


async def _throw_away(receive: Receive) -> None:
    size = 0
    while size <= _BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        size += len(message.get("body", b""))
