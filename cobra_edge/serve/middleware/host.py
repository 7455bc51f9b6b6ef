"""What every request passes before a route sees it: whose name it calls us by, its key, its type, and its whole body.

Each door refuses with a `Refusal`, and a refusal closes its connection, since the rest of the request may never come.
Nothing here allows other origins anything: without CORS headers a browser keeps our answers from foreign pages, and a body that
has to be application/json keeps them from asking, for that needs a preflight, which fails.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import InputError
from ..address_policy import LOOPBACK_HOSTS, client_of, is_loopback
from ..errors import Refusal
from ..limits import Limits
from ..lingering_close import refuse
from ..paths import CanonicalPathMiddleware
from .admission import Admission, AdmissionMiddleware
from .body import BodyReader, ClientDisconnected

Check = Callable[[Scope, Headers], None]  # looks at a request's head; raises Refusal
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def with_middleware(
    app: ASGIApp,
    limits: Limits,
    key: str | None = None,
    hosts: Collection[str] | None = None,
    admission: Admission | None = None,
) -> ASGIApp:
    """Put the doors in front of an app, the cheapest first: a place is taken by who may, a body read of who has a place.

    Args:
        app: what is behind them.
        limits: of bodies.
        key: that requests for answers and measurements have to show; None for none.
        hosts: names this server may be called by, as `allowed_hosts` gives them; None for any.
        admission: the slots there are; None for any number.
    """
    checks: list[Check] = []
    if hosts is not None:
        checks.append(host_check(hosts))
    if key is not None:
        checks.append(key_check(key))
    checks.append(json_only)
    inside: ASGIApp = BodyMiddleware(app, BodyReader(limits))
    if admission is not None:
        inside = AdmissionMiddleware(inside, admission)
    return CanonicalPathMiddleware(ResponseHeadersMiddleware(Checks(inside, checks)))


def allowed_hosts(bound: str, named: Collection[str], *, has_key: bool) -> frozenset[str] | None:
    """Return the names in a request's Host header that are answered, or None for any.

    A foreign page can give its own name the address of this machine ("DNS rebinding") and is then, to a browser, our page;
    but the Host header still says its name, never an address. A key keeps it out, too.

    Args:
        bound: what the server listens on: an address or a name.
        named: what else it is called, such as the name that a proxy in front of it goes by.
        has_key: whether clients have to show one.

    Raises:
        InputError: what it is called is no name.
    """
    for name in named:
        if "/" in name or not (_NAME.fullmatch(_host_of(name)) or _is_address(_host_of(name))):
            raise InputError(f"--allowed-host {name!r}: expected a name alone, such as example.org")
    bound = _host_of(bound)
    if has_key and not is_loopback(bound) and not named:
        return None
    return frozenset({*LOOPBACK_HOSTS, bound, *map(_host_of, named)})


def host_check(hosts: Collection[str]) -> Check:
    """Return the check that a request calls this server by one of its names, with any port."""

    def check(scope: Scope, headers: Headers) -> None:
        got = headers.get("host", "")
        if _host_of(got) not in hosts and not _is_address(_host_of(got)):
            message = (
                f"this server is not called {got[:100]!r}; use {', '.join(sorted(hosts))}, or start it with --allowed-host"
            )
            raise Refusal(403, message, "host_not_allowed")

    return check


def _host_of(authority: str) -> str:
    """Return the name of `name`, `name:port`, `[address]:port` or a bare IPv6 address, as names are compared."""
    if authority.startswith("["):
        name = authority[1:].partition("]")[0]
    else:
        name = authority if authority.count(":") > 1 else authority.partition(":")[0]
    return name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def key_check(key: str) -> Check:
    """Return the check that requests for answers and measurements show the key, compared in constant time.

    Raises:
        InputError: the key is empty.
    """
    if not key:
        raise InputError("the API key is empty; give one, or none at all")
    expected = key.encode()

    def check(scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if not (path.startswith("/v1/") or path.startswith("/metrics")):
            return
        shown = headers.getlist("authorization")
        kind, _, got = shown[0].partition(" ") if len(shown) == 1 else ("", "", "")
        # headers come as bytes and were read as latin-1
        if kind.lower() != "bearer" or not hmac.compare_digest(got.strip().encode("latin-1"), expected):
            what = "the API key is not this server's" if shown else "no API key"
            message = f"{what}; send the header `Authorization: Bearer KEY` with the key the server was started with"
            raise Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return check


def json_only(scope: Scope, headers: Headers) -> None:
    """Refuse to read anything that is posted but JSON: what a foreign page's form or script can send without asking is not."""
    kind = headers.get("content-type", "")
    if scope["method"] == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, f"Content-Type is {kind[:100]!r}; expected application/json", "unsupported_media_type")


class Checks:
    """Asks every check about a request's head before anything else of it is looked at."""

    def __init__(self, app: ASGIApp, checks: Collection[Check]) -> None:
        self._app, self._checks = app, tuple(checks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; an ASGI app."""
        if scope["type"] == "websocket":  # nothing here speaks it, and no check knows of it
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                for check in self._checks:
                    check(scope, headers)
            except Refusal as refusal:
                await refuse(refusal, scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyMiddleware:
    """Reads a request's body to its end before the app is called."""

    def __init__(self, app: ASGIApp, body_reader: BodyReader) -> None:
        self._app, self._body_reader = app, body_reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it; an ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        more, address = True, client_of(scope)

        async def noting() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        try:
            whole, size = await self._body_reader.read(Headers(scope=scope), noting, address)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send, whole=not more)
            return
        except ClientDisconnected:
            return
        try:
            await self._app(scope, whole, send)
        finally:
            self._body_reader.shares.release(address, size)


class ResponseHeadersMiddleware:
    """Puts the headers that limit what browsers do with a response on all of them, beside what a route set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; an ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ours = {**HEADERS, **({"Cache-Control": "no-store"} if scope["path"].startswith("/v1/") else {})}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                for name, value in ours.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)
