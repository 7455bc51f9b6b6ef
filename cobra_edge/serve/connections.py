"""uvicorn's HTTP/1.1 protocol with timeouts and connection limits.

The connections of one address are limited. Where all are in use and another address connects, the address with the most loses
one that has no request in progress: an idle one, or one whose request is incomplete. So no client can lock the others out.

uvicorn has no timeout for a request's head, nor for a client that does not read its response. The timers are in the protocol,
since only the transport can abort a connection: closing one waits until all data are sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .address_policy import client_network
from .errors import ApiError
from .limits import MIN_CONNECTIONS, Limits
from .middleware.response_headers import HEADERS
from .strict_http import StrictConnection

log = logging.getLogger(__name__)


def limited_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Return the protocol class for uvicorn's `Config(http=..., ws="none")`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits, "by_address": {}})


class _LimitedProtocol(H11Protocol):
    conn: StrictConnection
    limits: Limits
    by_address: dict[str, dict[_LimitedProtocol, None]]  # open connections of one server, the oldest first
    address = ""
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.conn = StrictConnection(h11.SERVER)
        self.address = client_network(self.client[0] if self.client else "")
        own = self.by_address.setdefault(self.address, {})
        own[self] = None
        # data that the kernel does not take at once pause writing, which starts the timer
        transport.set_write_buffer_limits(high=0)
        retry = {"Retry-After": "1"}
        if len(own) > self.limits.connections_per_address:
            message = f"{len(own) - 1} connections from your address are open, its maximum; close some, or reuse them"
            self._send_error(ApiError(429, message, "too_many_connections", headers=retry))
        elif len(self.connections) > self.limits.connections and not self._evicted_idle(own):
            message = f"{self.limits.connections} connections are open, the maximum; retry in 1 s"
            self._send_error(ApiError(503, message, "too_many_connections", headers=retry))
        else:
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        own = self.by_address.get(self.address, {})
        own.pop(self, None)
        if not own:
            self.by_address.pop(self.address, None)
        super().connection_lost(exc)

    def _evicted_idle(self, own: Collection[_LimitedProtocol]) -> bool:
        """Close an idle connection of the address with the most, unless it is our own; False where there is none."""
        most = max(self.by_address.values(), key=len)
        if len(most) <= max(len(own), MIN_CONNECTIONS):
            return False
        spare = next((c for c in most if c._is_idle() and not c.transport.is_closing()), None)
        if spare is None:
            return False
        spare.transport.close()
        return True

    def _is_idle(self) -> bool:
        """Whether no request is in progress: none has come, or not all of it."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def handle_events(self) -> None:
        """Handle new bytes or, after a response, pipelined ones."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE or not self._head_begun():
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def _head_begun(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def _head_is_late(self) -> None:
        if not self._head_begun():  # browsers open connections in advance
            self.transport.close()
            return
        message = f"the head of the request did not arrive within {self.limits.header_seconds:g} seconds; send it without delay"
        self._send_error(ApiError(408, message, "header_timeout"))

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_send_timer()
        self._send_timer = self.loop.call_later(self.limits.send_seconds, self._drop)

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def _drop(self) -> None:
        log.info("a client read nothing for %g seconds; its connection is aborted", self.limits.send_seconds)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Send 400 in the shape of all errors; uvicorn's `msg` has no details."""
        why = self.conn.rejected or "it is malformed"
        self._send_error(ApiError(400, f"the request is not valid HTTP/1.1: {why}", "invalid_http"))

    def _send_error(self, error: ApiError) -> None:
        """Send an error without calling the app, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # a response is in progress
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        headers = list({**own, **HEADERS, **error.headers}.items())
        response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:  # cancel the route, which is still running
            self.cycle.disconnected = True
            self.cycle.message_event.set()
