"""Request counts by final status. This middleware is outside the others, so that what they reject is counted too."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # as nginx logs it; HTTP has no such status
_ENDED = "cobra_edge.ended"


def set_final_status(scope: Scope, status: int) -> None:
    """Note how a stream ended, whose status line was sent at its start."""
    scope[_ENDED] = status


def final_status(scope: Scope, sent: int) -> int:
    """Return the status noted by `set_final_status`, else the status sent."""
    status: int = scope.get(_ENDED, sent)
    return status


class MetricsMiddleware:
    """ASGI middleware that counts the final status of each POST."""

    def __init__(self, app: ASGIApp, count: Callable[[int], None]) -> None:
        """Wrap an app.

        Args:
            app: with the other middleware.
            count: called with the HTTP status of every POST, or what `set_final_status` noted; CLIENT_GONE for no response.
        """
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            self._count(final_status(scope, status))
