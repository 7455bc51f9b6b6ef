"""The hosts that images may be fetched from, and the addresses of images on them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from ..errors import InputError
from .address_policy import is_public
from .errors import Refusal

_PORTS = {"http": 80, "https": 443}
_LONGEST_URL = 8192
_AS_IT_IS = "/%:=&?~+!$,;'@()*[]"  # in a path or a query
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


@dataclass(frozen=True)
class Location:
    """Where an image is, taken apart once, so that what is checked and what is asked cannot differ.

    Attributes:
        host: as DNS has it: lower case, international names in ASCII, no dot at the end; an address without brackets.
        target: path and query, in ASCII.
    """

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, url: str) -> Location:
        """Take a URL apart.

        Raises:
            Refusal: 400, it is not an http or https URL that all programs read the same way.
        """
        if len(url) > _LONGEST_URL:
            raise _refused(f"it has {len(url):,} characters, at most {_LONGEST_URL:,} are read")
        if re.search(r"[\x00-\x20\x7f\\\ud800-\udfff]", url):  # dropped by urlsplit, or read in many ways
            raise _refused("it has spaces, control characters or backslashes")
        try:
            parts = urlsplit(url)
            host, port = _host(parts.hostname or ""), parts.port
        except ValueError as error:
            raise _refused(f"it is not a URL ({error})") from error
        if parts.scheme not in _PORTS:
            raise _refused("it does not begin with http:// or https://")
        if "@" in parts.netloc:
            raise _refused("it has a user name or a password")
        query = f"?{quote(parts.query, safe=_AS_IT_IS)}" if parts.query else ""
        target = quote(parts.path or "/", safe=_AS_IT_IS) + query
        return cls(parts.scheme, host, _PORTS[parts.scheme] if port is None else port, target)

    @property
    def authority(self) -> str:
        """Host and port as a URL and a Host header have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole of it, in ASCII."""
        return f"{self.scheme}://{self.authority}{self.target}"


class ImageHosts:
    """An allow-list of hosts."""

    def __init__(self, hosts: Iterable[str]) -> None:
        """Read the list.

        Args:
            hosts: `name`, `*.name` for all below a name, `address`; each with `:port` where it is neither 80 nor 443.

        Raises:
            InputError: an entry is none of those, or an address that no image is fetched from.
        """
        self._entries = tuple(_entry(host) for host in hosts)

    def require(self, location: Location) -> None:
        """Refuse a location that is not on the list.

        Raises:
            Refusal: 400.
        """
        if not any(_covers(name, port, location) for name, port in self._entries):
            where = f"{location.host}:{location.port}"
            raise _refused(f"images are not fetched from {where}; the server's --allow-image-host says from where they are")


def _covers(name: str, port: int | None, location: Location) -> bool:
    if location.port != port and not (port is None and location.port in _PORTS.values()):
        return False
    return location.host.endswith(name[1:]) if name.startswith("*.") else location.host == name


def _entry(text: str) -> tuple[str, int | None]:
    """Return the name, with its `*.` if any, and the port of an entry."""
    below = text.startswith("*.")
    try:
        if "/" in text or "@" in text:
            raise ValueError("only a name, without http:// and path")
        parts = urlsplit(f"//{text.removeprefix('*.')}")
        host = _host(parts.hostname or "")
        address = _address(host)
        if address is not None and (below or not is_public(address)):
            raise ValueError("images are fetched from public addresses only")
        if below and "." not in host:
            raise ValueError("a whole top-level domain is too much")
        return ("*." + host if below else host), parts.port
    except ValueError as error:
        raise InputError(
            f"--allow-image-host {text!r}: {error}; give a name such as example.org or *.example.org:8443"
        ) from error


def _host(name: str) -> str:
    """Return a host's name as DNS has it, or its address in its shortest form.

    Raises:
        ValueError: it is neither.
    """
    if len(name) > 253:
        raise ValueError("the host's name is too long")
    address = _address(name)
    if address is not None:
        return str(address)
    host = name.encode("idna").decode("ascii").lower().removesuffix(".")
    if not _NAME.fullmatch(host):
        raise ValueError(f"{name[:100]!r} is not the name of a host")
    return host


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refused(why: str) -> Refusal:
    return Refusal(400, f"the image's address: {why}", "invalid_image_url", "messages")
