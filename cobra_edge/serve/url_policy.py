"""URL policy: parsing of image URLs, and the allow-list of hosts."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ..errors import InputError
from .address_policy import is_public
from .errors import ApiError

_PORTS = {"http": 80, "https": 443}
_MAX_URL_CHARACTERS = 8192
_SAFE = "/%:=&?~+!$,;'@()*[]"  # characters that stay unescaped in a path or query
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


@dataclass(frozen=True)
class Location:
    """A parsed URL: parsed once, so that the URL checked and the URL requested cannot differ.

    Attributes:
        host: lower case, international names in ASCII, without a trailing dot; an address without brackets.
        target: path and query, in ASCII.
    """

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, url: str) -> Location:
        """Parse a URL.

        Raises:
            ApiError: 400, not an http or https URL, or ambiguous.
        """
        if len(url) > _MAX_URL_CHARACTERS:
            raise _bad_url(f"it has {len(url):,} characters, the maximum is {_MAX_URL_CHARACTERS:,}")
        if re.search(r"[\x00-\x20\x7f\\\ud800-\udfff]", url):  # dropped by urlsplit, or ambiguous
            raise _bad_url("it has spaces, control characters or backslashes")
        try:
            parts = urlsplit(url)
            host, port = _host(parts.hostname or ""), parts.port
        except ValueError as error:
            raise _bad_url(f"it is not a URL ({error})") from error
        if parts.scheme not in _PORTS:
            raise _bad_url("it does not begin with http:// or https://")
        if "@" in parts.netloc:
            raise _bad_url("it has a user name or a password")
        query = f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
        target = quote(parts.path or "/", safe=_SAFE) + query
        return cls(parts.scheme, host, _PORTS[parts.scheme] if port is None else port, target)

    @property
    def authority(self) -> str:
        """Host and port, as in a URL and a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, in ASCII."""
        return f"{self.scheme}://{self.authority}{self.target}"


class ImageHosts:
    """An allow-list of hosts."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Parse the list.

        Args:
            hosts: `name`, `*.name` for its subdomains, or `address`; each with `:port` where it is neither 80 nor 443.

        Raises:
            InputError: an entry is none of those, or not a public address.
        """
        self._entries = tuple(_entry(host) for host in hosts)

    def require(self, location: Location) -> None:
        """Refuse a location that is not on the list.

        Raises:
            ApiError: 400.
        """
        if not any(_covers(name, port, location) for name, port in self._entries):
            where = f"{location.host}:{location.port}"
            raise _bad_url(f"images from {where} are not allowed; start the server with --allow-image-host {location.host}")


def _covers(name: str, port: int | None, location: Location) -> bool:
    if location.port != port and not (port is None and location.port in _PORTS.values()):
        return False
    return location.host.endswith(name[1:]) if name.startswith("*.") else location.host == name


def _entry(text: str) -> tuple[str, int | None]:
    """Return host (with its `*.` if any) and port of an entry."""
    below = text.startswith("*.")
    try:
        if "/" in text or "@" in text:
            raise ValueError("expected a host without http:// and path")
        parts = urlsplit(f"//{text.removeprefix('*.')}")
        host = _host(parts.hostname or "")
        address = _address(host)
        if address is not None and (below or not is_public(address)):
            raise ValueError("not a public address")
        if below and "." not in host:
            raise ValueError("a top-level domain is too wide")
        return ("*." + host if below else host), parts.port
    except ValueError as error:
        raise InputError(
            f"--allow-image-host {text!r}: {error}; give a name such as example.org or *.example.org:8443"
        ) from error


def _host(name: str) -> str:
    """Return a normalized host name or address.

    Raises:
        ValueError: neither.
    """
    if len(name) > 253:
        raise ValueError("the host's name is too long")
    address = _address(name)
    if address is not None:
        return str(address)
    host = name.encode("idna").decode("ascii").lower().removesuffix(".")
    if not _NAME.fullmatch(host):
        raise ValueError(f"{name[:100]!r} is not a host name")
    return host


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bad_url(why: str) -> ApiError:
    return ApiError(400, f"image URL: {why}", "invalid_image_url", "messages")
