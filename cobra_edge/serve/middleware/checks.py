"""Checks of a request's head (host, API key, content type), before its body is read.

No CORS headers are sent, so a browser keeps responses from pages of other origins. Since a body must be application/json, such
a page cannot send one either: it would need a preflight request, which fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ApiError
from ..lingering_close import send_error

Check = Callable[[Scope, Headers], None]  # raises ApiError


def json_only(scope: Scope, headers: Headers) -> None:
    """Raise ApiError 415 for a POST that is not application/json, as cross-origin forms and simple requests are not."""
    kind = headers.get("content-type", "")
    if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:100]!r}; expected application/json", "unsupported_media_type")


class ChecksMiddleware:
    """ASGI middleware that runs the checks of a request's head."""

    def __init__(self, app: ASGIApp, checks: Collection[Check]) -> None:
        self._app, self._checks = app, tuple(checks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":  # no route uses it
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                for check in self._checks:
                    check(scope, headers)
            except ApiError as error:
                await send_error(error, scope, receive, send)
                return
        await self._app(scope, receive, send)
