"""Admission control: how many requests run or wait, decided before a body is read or an image decoded."""

from __future__ import annotations

import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..address_policy import client_of
from ..address_shares import AddressShares
from ..errors import ApiError
from ..lingering_close import send_error

_WEIGHT = 0.1  # of the newest answer in the running mean


class Admission:
    """Slots for requests. Not thread-safe: use it on the event loop.

    Attributes:
        shares: slots in use, by address.
        mean_seconds: running mean of the duration of answered requests.
    """

    def __init__(self, slots: int, slots_per_address: int | None = None) -> None:
        """Create free slots; one address may use all of them unless a number is given."""
        self.shares = AddressShares(slots, slots_per_address or slots)
        self.mean_seconds = 1.0

    @property
    def in_use(self) -> int:
        """Slots in use."""
        return self.shares.total

    def enter(self, address: str) -> float:
        """Take a slot and return the time.

        Raises:
            ApiError: 429, with a Retry-After by which half of the requests should have ended.
        """
        wait = max(1, min(60, math.ceil(self.mean_seconds / 2)))
        own, retry = self.shares.held_by(address), f"retry in {wait} s"
        if self.in_use >= self.shares.limit:
            message = f"{self.in_use} requests are running or queued, the maximum; {retry}"
        elif own >= self.shares.per_address:
            message = f"{own} requests from your address are running or queued, its maximum; {retry}"
        else:
            self.shares.take(address)
            return time.monotonic()
        raise ApiError(429, message, "queue_full", headers={"Retry-After": str(wait)})

    def leave(self, address: str, entered: float, *, answered: bool) -> None:
        """Release a slot; only answered requests count in `mean_seconds`."""
        self.shares.release(address)
        if answered:
            self.mean_seconds += _WEIGHT * (time.monotonic() - entered - self.mean_seconds)


class AdmissionMiddleware:
    """ASGI middleware that holds a slot for each POST, or sends 429."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        """Wrap an app."""
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        address = client_of(scope)
        try:
            entered = self.admission.enter(address)
        except ApiError as error:
            await send_error(error, scope, receive, send)
            return
        answered = False

        async def observed(message: Message) -> None:
            nonlocal answered
            answered = answered or message.get("status") == 200
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            self.admission.leave(address, entered, answered=answered)
