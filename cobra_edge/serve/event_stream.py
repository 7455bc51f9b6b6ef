"""Server-sent events as in OpenAI's API: one JSON object per event, `[DONE]` at the end.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answer_stream import cancel_on_disconnect
from .errors import ApiError
from .middleware.metrics import CLIENT_GONE, set_final_status

MEDIA_TYPE = "text/event-stream"


class EventStream(Response):
    """A response that streams events; the generator is closed when the client disconnects.

    The final status is noted in the request's scope: 200, the status of an ApiError, CLIENT_GONE, or 500 for an unexpected
    error.
    """

    media_type = MEDIA_TYPE

    def __init__(self, first: BaseModel, events: AsyncGenerator[BaseModel, None]) -> None:
        """Stream events.

        Args:
            first: first event. An error before it gets an HTTP status.
            events: the others, from a generator that has started; an ApiError from it becomes the last event.
        """
        self.first, self.events = first, events
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            set_final_status(scope, await cancel_on_disconnect(receive, self._send_all(send)))
        except ClientDisconnect:
            set_final_status(scope, CLIENT_GONE)
        except Exception:  # counted as a failure, and raised again
            set_final_status(scope, 500)
            raise
        finally:
            await self.events.aclose()

    async def _send_all(self, send: Send) -> int:
        """Send all events; returns the final status."""

        async def send_event(data: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_event(self.first.model_dump_json())
        try:
            async for event in self.events:
                await send_event(event.model_dump_json())
        except ApiError as error:
            await send_event(json.dumps(error.body()), more=False)
            return error.status
        await send_event("[DONE]", more=False)
        return 200
