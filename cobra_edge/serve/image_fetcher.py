"""Fetches images by URL, from allowed hosts only, redirects included.

With a URL a client makes this machine send a request from inside its network (server-side request forgery). So the host must be
on an allow-list and all its addresses public. The connection uses the address that was checked: a second DNS query may have
another answer (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from urllib.parse import urljoin

import anyio
import httpcore

from ..version import __version__
from .address_policy import Address, is_public
from .errors import ApiError
from .limits import Limits
from .url_policy import ImageHosts, Location

Resolver = Callable[[str, int], Awaitable[Sequence[Address]]]
_REDIRECTS = 3
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_CONNECTIONS = 8
_CONNECT_SECONDS = 5.0  # for one address of several
_HEADERS = (
    (b"Accept", b"image/*"),
    (b"Accept-Encoding", b"identity"),  # compressed content has no known size
    (b"User-Agent", f"cobra-edge/{__version__}".encode()),
)
_FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.UnsupportedProtocol)


async def resolve(host: str, port: int) -> Sequence[Address]:
    """Return the addresses of a host from the system's resolver.

    Raises:
        OSError: the host has no address.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(address[0]) for *_, address in found]


class Fetcher:
    """Fetches images from allowed hosts.

    `resolver` and `reachable` give the addresses of a name and whether each may be used; `trusted` has the trusted
    certificates.
    """

    def __init__(
        self,
        hosts: Collection[str],
        limits: Limits,
        resolver: Resolver = resolve,
        reachable: Callable[[Address], bool] = is_public,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        """Create a fetcher for a list of hosts, see `ImageHosts`.

        Raises:
            InputError: an entry of the list is not a host.
        """
        self._hosts = ImageHosts(hosts)
        self._limits = limits
        # one connection per image: none stays open, and clients share none
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=trusted or httpcore.default_ssl_context(),
            max_connections=_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=_CheckedNetwork(resolver, reachable),
        )

    async def fetch(self, url: str) -> bytes:
        """Return the content of a URL.

        Raises:
            ApiError: 400, the URL or a redirect is not allowed, or the request fails; 413, the file is too large.
        """
        location = Location.of(url)
        try:
            with anyio.fail_after(self._limits.fetch_seconds):
                for _ in range(1 + _REDIRECTS):
                    self._hosts.require(location)
                    got = await self._get(location)
                    if isinstance(got, bytes):
                        return got
                    location = got
        except TimeoutError as error:
            raise _not_fetched(f"{location.host} took more than {self._limits.fetch_seconds:g} seconds") from error
        except _FAILURES as error:
            raise _not_fetched(f"{location.host} could not be reached ({type(error).__name__})") from error
        raise _not_fetched(f"more than {_REDIRECTS} redirects")

    async def _get(self, location: Location) -> bytes | Location:
        """Return the content of a location, or the location that it redirects to."""
        url = httpcore.URL(scheme=location.scheme, host=location.host, port=location.port, target=location.target)
        headers = [(b"Host", location.authority.encode()), *_HEADERS]
        timeouts = {"connect": _CONNECT_SECONDS}
        async with self._pool.stream("GET", url, headers=headers, extensions={"timeout": timeouts}) as response:
            fields = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECT_STATUSES and b"location" in fields:
                return Location.of(urljoin(location.url, fields[b"location"]))
            if response.status != 200:
                raise _not_fetched(f"{location.host} answered with status {response.status}")
            if fields.get(b"content-encoding", "identity").lower() != "identity":
                raise _not_fetched(f"{location.host} sends compressed content ({fields[b'content-encoding'][:100]})")
            return await self._file(response, fields.get(b"content-length", ""))

    async def _file(self, response: httpcore.Response, declared: str) -> bytes:
        limit = self._limits.image_bytes
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        file = bytearray()
        async for part in response.aiter_stream():
            file += part
            if len(file) > limit:
                raise _too_large(limit)
        return bytes(file)


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Network backend that resolves a name once, checks all its addresses, and connects to one of them."""

    def __init__(self, resolver: Resolver, reachable: Callable[[Address], bool]) -> None:
        self._resolver = resolver
        self._reachable = reachable
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolver(host, port)
        except (OSError, UnicodeError) as error:
            raise _not_fetched(f"{host} has no address") from error
        # a private address among public ones is an attack or a mistake
        if not addresses or not all(map(self._reachable, addresses)):
            raise _not_fetched(f"{host} is not on the public internet")
        failure: Exception = httpcore.ConnectError()
        for address in addresses:
            try:
                return await self._network.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def _not_fetched(why: str) -> ApiError:
    message = f"the image was not fetched: {why}; send it as a data: URL"
    return ApiError(400, message, "image_not_fetched", "messages")


def _too_large(limit: int) -> ApiError:
    message = f"the image at this URL has more than {limit:,} bytes, the maximum; scale it down"
    return ApiError(413, message, "image_too_large", "messages")
