"""Every question is counted once, by how it ended; from outside all doors, so that those who are refused there count too."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # nginx's; no status of HTTP's own says it
_ENDED = "cobra_edge.ended"


def set_final_status(scope: Scope, status: int) -> None:
    """Note how a response ended whose status had to be sent long before: a stream's."""
    scope[_ENDED] = status


def final_status(scope: Scope, sent: int) -> int:
    """Return how a response ended whose status was sent, or CLIENT_GONE where none was."""
    status: int = scope.get(_ENDED, sent)
    return status


class MetricsMiddleware:
    """Tells how each request that asks for something ended."""

    def __init__(self, app: ASGIApp, count: Callable[[int], None]) -> None:
        """Stand before an app.

        Args:
            app: with its doors.
            count: told the HTTP status of every POST, or what `set_final_status` noted; CLIENT_GONE where nothing was answered.
        """
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; an ASGI app."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._count(final_status(scope, status))
