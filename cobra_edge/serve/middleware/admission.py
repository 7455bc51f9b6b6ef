"""How many questions are inside the server, decided at the door: before a body is read or an image decoded."""

from __future__ import annotations

import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..address_policy import client_of
from ..address_shares import AddressShares
from ..errors import Refusal
from ..lingering_close import refuse

_WEIGHT = 0.1  # of the newest answer in the running mean


class Admission:
    """Places for questions. For the event loop alone.

    Attributes:
        shares: the slots there are, and how many each address has.
        mean_seconds: how long a question that is answered stays, a running mean.
    """

    def __init__(self, slots: int, slots_per_address: int | None = None) -> None:
        """Begin with all slots free; one address may have all of them unless a number is given."""
        self.shares = AddressShares(slots, slots_per_address or slots)
        self.mean_seconds = 1.0

    @property
    def inside(self) -> int:
        """How many questions are inside."""
        return self.shares.total

    def enter(self, address: str) -> float:
        """Take a place; returns the time. Raises Refusal 429, with the time in which half of those inside should have left."""
        wait = max(1, min(60, math.ceil(self.mean_seconds / 2)))
        own, again = self.shares.held_by(address), f"ask again in {wait} s"
        if self.inside >= self.shares.limit:
            message = f"{self.inside} questions are being answered or wait, which is all there is room for; {again}"
        elif own >= self.shares.per_address:
            message = f"{own} questions of your address are being answered or wait, which is its share; {again}"
        else:
            self.shares.take(address)
            return time.monotonic()
        raise Refusal(429, message, "queue_full", headers={"Retry-After": str(wait)})

    def leave(self, address: str, entered: float, *, answered: bool) -> None:
        """Give a place back; those that were refused on the way say nothing of how long an answer takes."""
        self.shares.release(address)
        if answered:
            self.mean_seconds += _WEIGHT * (time.monotonic() - entered - self.mean_seconds)


class AdmissionMiddleware:
    """An ASGI layer that gives each POST a place for as long as it takes, or refuses it."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        """Stand before an app."""
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        address = client_of(scope)
        try:
            entered = self.admission.enter(address)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
            return
        answered = False

        async def noting(message: Message) -> None:
            nonlocal answered
            answered = answered or message.get("status") == 200
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.admission.leave(address, entered, answered=answered)
