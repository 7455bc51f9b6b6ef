"""`serve --json`: what happens, as one JSON object a line on stdout: the start, every request, the end. Logs stay on stderr.

Nothing of what is asked or answered is in a line. A reader that is slow must not keep the event loop waiting, so a thread
writes; where the reader falls far behind, lines are dropped, and counted.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from datetime import datetime, timezone
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .middleware.metrics import CLIENT_GONE, final_status

log = logging.getLogger(__name__)

_WAITING = 10_000  # lines; some megabytes
_PATIENCE_SECONDS = 5.0  # for a reader to take the last ones
_LONGEST_PATH = 200


class EventLines:
    """Writes events to a stream, one a line, from a thread of its own."""

    def __init__(self, stream: TextIO, waiting: int = _WAITING) -> None:
        """Start the thread; at most `waiting` lines wait for the reader."""
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(waiting)
        self._dropped = self._requests = 0
        self._thread = threading.Thread(target=self._write, name="event-lines", daemon=True)
        self._thread.start()

    def tell(self, event: str, **fields: Any) -> None:
        """Write an event, with the time; dropped where too many wait. Never blocks."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._lines.put_nowait(json.dumps({"event": event, "time": now, **fields}))
        except queue.Full:
            self._dropped += 1

    def request(self, **fields: Any) -> None:
        """Write that a request ended."""
        self._requests += 1
        self.tell("request", **fields)

    def close(self) -> None:
        """Write the last event, and wait until the reader took all, but not for ever."""
        last = {"requests": self._requests, "dropped_lines": self._dropped}
        try:
            self._lines.put(json.dumps({"event": "stopped", **last}), timeout=_PATIENCE_SECONDS)
            self._lines.put(None, timeout=_PATIENCE_SECONDS)
        except queue.Full:
            log.warning("nobody reads what --json writes; the last lines are lost")
        self._thread.join(_PATIENCE_SECONDS)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError:  # the reader left, the server stays; whatever is still buffered, or to come, has nowhere to go
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                log.warning("nobody reads what --json writes any more; serving goes on")


class AccessLogMiddleware:
    """Tells how each request ended; it stands before all else."""

    def __init__(self, app: ASGIApp, lines: EventLines) -> None:
        self._app, self._lines = app, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; an ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = time.perf_counter(), scope["path"], CLIENT_GONE

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client = scope.get("client")
            self._lines.request(
                client=client[0] if client else None,
                method=scope["method"],
                path=path[:_LONGEST_PATH],
                status=final_status(scope, status),
                duration_ms=round((time.perf_counter() - began) * 1e3, 3),
            )
