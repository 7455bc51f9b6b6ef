"""A request's body is read to its end before a route sees any of it: within a clock, a count, and a share of the memory."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import Message, Receive

from ..address_shares import AddressShares
from ..errors import Refusal
from ..limits import Limits


class ClientDisconnected(Exception):
    """The client closed its connection before its request was complete; nobody is left to answer."""


class BodyReader:
    """Reads bodies, and knows how many bytes of all requests are in memory: a question keeps its image while it waits."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # in bytes, of bodies that are being read, or whose requests are not at their end
        self.shares = AddressShares(limits.bodies_bytes, limits.bodies_bytes_per_address)

    @property
    def size_bytes(self) -> int:
        """How much of all requests is in memory."""
        return self.shares.total

    async def read(self, headers: Headers, receive: Receive, address: str) -> tuple[Receive, int]:
        """Read a body that an address sends.

        Returns:
            A `receive` that gives it in one piece and then says whether the client is still there, and the body's size in
            bytes, which is to be given back to `shares` when the request is at its end.

        Raises:
            Refusal: 413 too large, whether declared or found while reading, or of too many values; 408 too slow; 503 too many
                at the same time.
            ClientDisconnected: before the end.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large(f"{int(declared):,} bytes")
        try:
            with anyio.fail_after(self._limits.body_seconds):
                body = await self._all(receive, address)
        except TimeoutError as error:
            message = (
                f"the body did not arrive within {self._limits.body_seconds:g} seconds; send it faster, or a smaller image"
            )
            raise Refusal(408, message, "body_timeout") from error
        return _once(body, receive), len(body)

    async def _all(self, receive: Receive, address: str) -> bytes:
        body = bytearray()  # a list of its parts would take many times their size, were they single bytes
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                body += message.get("body", b"")
                self.shares.take(address, len(body) - size)
                size = len(body)
                if size > self._limits.body_bytes:
                    raise self._too_large("more")
                self._require_room(address)
                if not message.get("more_body", False):
                    self._require_few_values(body)
                    return bytes(body)
        except BaseException:
            self.shares.release(address, size)
            raise

    def _require_room(self, address: str) -> None:
        """Refuse a body that has no room beside the others: all of them, or those of its own address."""
        again = {"Retry-After": "1"}
        if self.shares.total > self.shares.limit:
            crowded = "the requests that are inside take all the memory there is for them; come again in a second"
            raise Refusal(503, crowded, "too_many_bodies", headers=again)
        if self.shares.held_by(address) > self.shares.per_address:
            share = f"the requests of your address take its share of the memory, {self.shares.per_address >> 20} MiB"
            raise Refusal(429, f"{share}; wait until some are answered", "too_many_bodies", headers=again)

    def _require_few_values(self, body: bytearray) -> None:
        """Refuse what takes many times its size, and seconds of everybody's time, to parse: megabytes of `[],`."""
        limit = self._limits.body_values
        if sum(map(body.count, (b",", b"[", b"{"))) > limit:
            message = f"the body has more than {limit:,} brackets and commas, which is the most that is read; shorten it"
            raise Refusal(413, message, "body_too_large")

    def _too_large(self, got: str) -> Refusal:
        limit = self._limits.body_bytes
        return Refusal(413, f"the body has {got}, at most {limit:,} bytes are read; scale the image down", "body_too_large")


def _once(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again
