"""How many questions are inside the server, decided at the door: before a body is read or a picture decoded."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .parting import refuse
from .refusals import Refusal

_WEIGHT = 0.1  # of the newest answer in the running mean


@dataclass
class Admission:
    """Places for questions. For the event loop alone.

    Attributes:
        places: at most so many questions are inside.
        inside: so many are there now.
        mean_seconds: how long one that is answered stays, a running mean.
    """

    places: int
    inside: int = 0
    mean_seconds: float = 1.0

    def enter(self) -> float:
        """Take a place; returns the time. Raises Refusal 429, with the time in which half of those inside should have left."""
        if self.inside >= self.places:
            wait = max(1, min(60, math.ceil(self.mean_seconds / 2)))
            message = (
                f"{self.inside} questions are being answered or wait, which is all there is room for; ask again in {wait} s"
            )
            raise Refusal(429, message, "queue_full", headers={"Retry-After": str(wait)})
        self.inside += 1
        return time.monotonic()

    def leave(self, entered: float, *, answered: bool) -> None:
        """Give a place back; those that were refused on the way say nothing of how long an answer takes."""
        self.inside -= 1
        if answered:
            self.mean_seconds += _WEIGHT * (time.monotonic() - entered - self.mean_seconds)


class AdmissionDoor:
    """An ASGI layer that gives each POST a place for as long as it takes, or refuses it."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        """Stand before an app."""
        self.app, self.admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            entered = self.admission.enter()
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
            self.admission.leave(entered, answered=answered)
