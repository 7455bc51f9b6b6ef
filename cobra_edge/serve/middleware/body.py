"""Body limit: a request's body is read completely before a route runs, within limits on time, size and memory."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..address_policy import client_of
from ..address_shares import AddressShares
from ..errors import ApiError
from ..limits import Limits
from ..lingering_close import send_error


class ClientDisconnected(Exception):
    """The client closed its connection before its request was complete."""


class BodyReader:
    """Reads bodies, and counts the bytes that all requests hold in memory: a queued request keeps its image."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # in bytes, of bodies that are being read or whose requests have not ended
        self.shares = AddressShares(limits.bodies_bytes, limits.bodies_bytes_per_address)

    @property
    def size_bytes(self) -> int:
        """Bytes of all requests in memory."""
        return self.shares.total

    async def read(self, headers: Headers, receive: Receive, address: str) -> tuple[Receive, int]:
        """Read the body of a request from an address.

        Returns:
            A `receive` that returns the body in one message and then reports a disconnect, and the body's size in bytes, which
            the caller releases from `shares` when the request ends.

        Raises:
            ApiError: 413 too large (declared, or found while reading) or too many values; 408 too slow; 503 or 429 no memory
                left for bodies.
            ClientDisconnected: before the end of the body.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.body_bytes:
            raise self._too_large(f"{int(declared):,} bytes")
        try:
            with anyio.fail_after(self._limits.body_seconds):
                body = await self._all(receive, address)
        except TimeoutError as error:
            message = f"the body did not arrive within {self._limits.body_seconds:g} seconds; send a smaller image"
            raise ApiError(408, message, "body_timeout") from error
        return _once(body, receive), len(body)

    async def _all(self, receive: Receive, address: str) -> bytes:
        body = bytearray()  # not a list of parts, which takes many times its size where they are single bytes
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
        """Raise ApiError where the bodies of all clients, or of this address, exceed their share of memory."""
        retry = {"Retry-After": "1"}
        if self.shares.total > self.shares.limit:
            full = "requests in progress use all the memory reserved for bodies; retry in 1 s"
            raise ApiError(503, full, "too_many_bodies", headers=retry)
        if self.shares.held_by(address) > self.shares.per_address:
            share = f"requests from your address use its share of the memory for bodies, {self.shares.per_address >> 20} MiB"
            raise ApiError(429, f"{share}; wait until some have ended", "too_many_bodies", headers=retry)

    def _require_few_values(self, body: bytearray) -> None:
        """Raise ApiError for JSON that takes many times its size, and seconds, to parse: megabytes of `[],`."""
        limit = self._limits.body_values
        if sum(map(body.count, (b",", b"[", b"{"))) > limit:
            message = f"the body has more than {limit:,} brackets and commas, the maximum; shorten it"
            raise ApiError(413, message, "body_too_large")

    def _too_large(self, got: str) -> ApiError:
        limit = self._limits.body_bytes
        return ApiError(413, f"the body has {got}, the maximum is {limit:,} bytes; scale the image down", "body_too_large")


def _once(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


class BodyMiddleware:
    """ASGI middleware that reads a request's body completely before it calls the app."""

    def __init__(self, app: ASGIApp, body_reader: BodyReader) -> None:
        self._app, self._body_reader = app, body_reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        more, address = True, client_of(scope)

        async def observed() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        try:
            whole, size = await self._body_reader.read(Headers(scope=scope), observed, address)
        except ApiError as error:
            await send_error(error, scope, receive, send, whole=not more)
            return
        except ClientDisconnected:
            return
        try:
            await self._app(scope, whole, send)
        finally:
            self._body_reader.shares.release(address, size)
