"""Access log of `serve --json`: one JSON object per line on stdout for the start, every request and the end.

No line contains a prompt or an answer. A thread writes the lines, so that a slow reader does not block the event loop; where it
falls far behind, lines are dropped and counted.
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

_QUEUE_LINES = 10_000  # some megabytes
_FLUSH_SECONDS = 5.0  # for the reader to take the last lines
_MAX_PATH_CHARACTERS = 200


class EventLines:
    """Writes events to a stream, one per line, from its own thread."""

    def __init__(self, stream: TextIO, queue_lines: int = _QUEUE_LINES) -> None:
        """Start the thread; further lines are dropped where `queue_lines` wait for the reader."""
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(queue_lines)
        self._dropped = self._requests = 0
        self._thread = threading.Thread(target=self._write, name="event-lines", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Write an event with the time, or drop it where the queue is full. Never blocks."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._lines.put_nowait(json.dumps({"event": event, "time": now, **fields}))
        except queue.Full:
            self._dropped += 1

    def request(self, **fields: Any) -> None:
        """Write the event of an ended request."""
        self._requests += 1
        self.write("request", **fields)

    def close(self) -> None:
        """Write the last event and flush, for a limited time."""
        last = {"requests": self._requests, "dropped_lines": self._dropped}
        try:
            self._lines.put(json.dumps({"event": "stopped", **last}), timeout=_FLUSH_SECONDS)
            self._lines.put(None, timeout=_FLUSH_SECONDS)
        except queue.Full:
            log.warning("the reader of --json takes no lines; the last lines are lost")
        self._thread.join(_FLUSH_SECONDS)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except OSError:  # the reader left, the server stays: discard what is buffered, and later lines
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, self._stream.fileno())
                os.close(devnull)
                log.warning("the reader of --json closed the pipe; serving goes on without the access log")


class AccessLogMiddleware:
    """ASGI middleware, the outermost, that logs each request when it ends."""

    def __init__(self, app: ASGIApp, lines: EventLines) -> None:
        self._app, self._lines = app, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = time.perf_counter(), scope["path"], CLIENT_GONE

        async def observed(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            client = scope.get("client")
            self._lines.request(
                client=client[0] if client else None,
                method=scope["method"],
                path=path[:_MAX_PATH_CHARACTERS],
                status=final_status(scope, status),
                duration_ms=round((time.perf_counter() - began) * 1e3, 3),
            )
