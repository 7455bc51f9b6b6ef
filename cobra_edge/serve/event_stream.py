"""Server-sent events, in OpenAI's dialect: one JSON object an event, `[DONE]` at the end.

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
from .errors import Refusal
from .middleware.metrics import CLIENT_GONE, set_final_status

MEDIA_TYPE = "text/event-stream"


class EventStream(Response):
    """A stream of events; the generator is closed when the client goes away.

    How it ended is noted in the request's scope: 200, the status of a Refusal, CLIENT_GONE, or 500 for what nobody foresaw.
    """

    media_type = MEDIA_TYPE

    def __init__(self, first: BaseModel, events: AsyncGenerator[BaseModel, None]) -> None:
        """Stream events.

        Args:
            first: event, so that what goes wrong before it has a status of its own.
            events: the others, from a generator that has begun; a Refusal from it is told as the last event.
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
        except Exception:
            set_final_status(scope, 500)
            raise
        finally:
            await self.events.aclose()

    async def _send_all(self, send: Send) -> int:
        """Send all events; returns the status they end with."""

        async def tell(data: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await tell(self.first.model_dump_json())
        try:
            async for event in self.events:
                await tell(event.model_dump_json())
        except Refusal as refusal:
            await tell(json.dumps(refusal.body()), more=False)
            return refusal.status
        await tell("[DONE]", more=False)
        return 200
