"""Fetches images from hosts that the operator allows, and from nowhere else, whatever names and redirects say.

A client that names an address makes this machine ask it, from inside its network ("server-side request forgery"). So the name
has to be on a list, and all its addresses public; the connection goes to the very address that was looked at, since a second
question to DNS may have another answer ("DNS rebinding").
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
from .errors import Refusal
from .limits import Limits
from .url_policy import ImageHosts, Location

Resolver = Callable[[str, int], Awaitable[Sequence[Address]]]
_REDIRECTS = 3
_REDIRECT_STATUSES = (301, 302, 303, 307, 308)
_CONNECTIONS = 8
_CONNECT_SECONDS = 5.0  # for one address of several
_HEADERS = (
    (b"Accept", b"image/*"),
    (b"Accept-Encoding", b"identity"),  # what is compressed has no size that could be watched
    (b"User-Agent", f"cobra-edge/{__version__}".encode()),
)
_FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.UnsupportedProtocol)


async def resolve(host: str, port: int) -> Sequence[Address]:
    """Return the addresses of a host, as the system's resolver gives them.

    Raises:
        OSError: there is none.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(address[0]) for *_, address in found]


class Fetcher:
    """Fetches images.

    `resolver` and `reachable` say what addresses a name has and which of them may be asked, `trusted` whose certificates count.
    """

    def __init__(
        self,
        hosts: Collection[str],
        limits: Limits,
        resolver: Resolver = resolve,
        reachable: Callable[[Address], bool] = is_public,
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        """Take a list of hosts, as `ImageHosts` has it.

        Raises:
            InputError: an entry of it is no host.
        """
        self._hosts = ImageHosts(hosts)
        self._limits = limits
        # a connection serves one image: nothing is left open, and nothing of one client's meets another's
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=trusted or httpcore.default_ssl_context(),
            max_connections=_CONNECTIONS,
            max_keepalive_connections=0,
            network_backend=_CheckedNetwork(resolver, reachable),
        )

    async def fetch(self, url: str) -> bytes:
        """Return what is at a URL.

        Raises:
            Refusal: 400, the URL or one it redirects to is not allowed, or does not give a file; 413, it is too large.
        """
        location = Location.of(url)
        try:
            with anyio.fail_after(self._limits.fetch_seconds):
                for _ in range(1 + _REDIRECTS):
                    self._hosts.require(location)
                    got = await self._ask(location)
                    if isinstance(got, bytes):
                        return got
                    location = got
        except TimeoutError as error:
            raise _not_fetched(f"{location.host} took more than {self._limits.fetch_seconds:g} seconds") from error
        except _FAILURES as error:
            raise _not_fetched(f"{location.host} could not be asked ({type(error).__name__})") from error
        raise _not_fetched(f"more than {_REDIRECTS} redirects")

    async def _ask(self, location: Location) -> bytes | Location:
        """Return what is at a location, or where else it says it is."""
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
                raise _not_fetched(f"{location.host} sends it compressed ({fields[b'content-encoding'][:100]})")
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
    """Connects to names whose addresses may all be asked, and to just the address that was looked at."""

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
        # one private address among public ones is a trap, or a mistake
        if not addresses or not all(map(self._reachable, addresses)):
            raise _not_fetched(f"{host} is not on the public internet")
        failure: Exception = httpcore.ConnectError()
        for address in addresses:
            try:
                return await self._network.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def _not_fetched(why: str) -> Refusal:
    message = f"the image was not fetched: {why}; send it as a data: URI"
    return Refusal(400, message, "image_not_fetched", "messages")


def _too_large(limit: int) -> Refusal:
    message = f"the image at this address has more than {limit:,} bytes, which is the most that is read; scale it down"
    return Refusal(413, message, "image_too_large", "messages")
