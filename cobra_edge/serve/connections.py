"""Connections that clients cannot hold for nothing: uvicorn's, with clocks on what it waits for and limits to their number.

One address has a share of them. Where all are taken and another address comes, the address that has most loses one on which
nothing is being answered: an idle one, or one whose request is not complete. So nobody can keep the others out.

uvicorn waits for ever for a request's head, and for a client to take what it is sent; only the time in between is limited.
The clocks belong here, beside the socket, since only here a connection can be dropped: closing one waits until all is sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Collection

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .address_policy import client_network
from .errors import Refusal
from .limits import MIN_CONNECTIONS, Limits
from .middleware.host import HEADERS
from .strict_http import StrictConnection

log = logging.getLogger(__name__)


def limited_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """Return the class of connections for uvicorn's `Config(http=...)`; `ws="none"` goes with it."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits, "by_address": {}})


class _LimitedProtocol(H11Protocol):
    conn: StrictConnection
    limits: Limits
    by_address: dict[str, dict[_LimitedProtocol, None]]  # those that are open, the oldest first; of one server
    address = ""
    _head_clock: asyncio.TimerHandle | None = None
    _send_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.conn = StrictConnection(h11.SERVER)
        self.address = client_network(self.client[0] if self.client else "")
        own = self.by_address.setdefault(self.address, {})
        own[self] = None
        # whatever the system does not take at once pauses writing, and so starts the clock
        transport.set_write_buffer_limits(high=0)
        again = {"Retry-After": "1"}
        if len(own) > self.limits.connections_per_address:
            message = f"{len(own) - 1} connections of your address are open, which is its share; close some, or use them again"
            self._refuse(Refusal(429, message, "too_many_connections", headers=again))
        elif len(self.connections) > self.limits.connections and not self._made_room(own):
            message = f"{self.limits.connections} connections are open, and no more are taken; come again in a second"
            self._refuse(Refusal(503, message, "too_many_connections", headers=again))
        else:
            self._head_clock = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_clock()
        self._stop_send_clock()
        own = self.by_address.get(self.address, {})
        own.pop(self, None)
        if not own:
            self.by_address.pop(self.address, None)
        super().connection_lost(exc)

    def _made_room(self, own: Collection[_LimitedProtocol]) -> bool:
        """Close a connection of the address that has most, where that is not our own; False where there is none to close."""
        most = max(self.by_address.values(), key=len)
        if len(most) <= max(len(own), MIN_CONNECTIONS):
            return False
        spare = next((c for c in most if c._answers_nothing() and not c.transport.is_closing()), None)
        if spare is None:
            return False
        spare.transport.close()
        return True

    def _answers_nothing(self) -> bool:
        """Whether no request of this connection is being answered: none has come, or not all of it."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def handle_events(self) -> None:
        """Look at new bytes or, after a response, at those that came before their turn."""
        super().handle_events()
        if self.conn.their_state is not h11.IDLE or not self._head_begun():
            self._stop_head_clock()
        elif self._head_clock is None and not self.transport.is_closing():
            self._head_clock = self.loop.call_later(self.limits.header_seconds, self._head_is_late)

    def _head_begun(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def _head_is_late(self) -> None:
        if not self._head_begun():  # such as a browser's, opened in case it is needed
            self.transport.close()
            return
        message = f"the head of the request did not arrive within {self.limits.header_seconds:g} seconds; send it at once"
        self._refuse(Refusal(408, message, "header_timeout"))

    def _stop_head_clock(self) -> None:
        if self._head_clock is not None:
            self._head_clock.cancel()
            self._head_clock = None

    def _stop_send_clock(self) -> None:
        if self._send_clock is not None:
            self._send_clock.cancel()
            self._send_clock = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_send_clock()
        self._send_clock = self.loop.call_later(self.limits.send_seconds, self._drop)

    def resume_writing(self) -> None:
        self._stop_send_clock()
        super().resume_writing()

    def _drop(self) -> None:
        log.info("a client took nothing for %g seconds; its connection is dropped", self.limits.send_seconds)
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the shape of all refusals; `msg` is uvicorn's, which says no more."""
        why = self.conn.refused or "it is malformed"
        self._refuse(Refusal(400, f"the request is not HTTP/1.1: {why}; send one that is", "invalid_http"))

    def _refuse(self, refusal: Refusal) -> None:
        """Send a refusal that no route sees, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the middle of an answer
            self.transport.abort()
            return
        body = json.dumps(refusal.body()).encode()
        own = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        headers = list({**own, **HEADERS, **refusal.headers}.items())
        response = h11.Response(status_code=refusal.status, headers=headers, reason=STATUS_PHRASES[refusal.status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:  # its route is still at work, and has nobody left to answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
