"""Host check: the names that a request's Host header may have.

A web page can point its own domain name at this machine's address ("DNS rebinding") and is then, to a browser, same-origin with
this server. The Host header still has the page's domain name, so requests under unknown names are rejected.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import Scope

from ...errors import InputError
from ..address_policy import LOOPBACK_HOSTS, is_loopback
from ..errors import ApiError
from .checks import Check

_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


def allowed_hosts(bound: str, named: Collection[str], *, has_key: bool) -> frozenset[str] | None:
    """Return the names that a Host header may have, or None for any name.

    A server on a public address with an API key accepts any name: the key keeps other pages out.

    Args:
        bound: address or name that the server listens on.
        named: further names, such as that of a reverse proxy.
        has_key: whether clients need an API key.

    Raises:
        InputError: a further name is not a host name.
    """
    for name in named:
        if "/" in name or not (_NAME.fullmatch(_host_of(name)) or _is_address(_host_of(name))):
            raise InputError(f"--allowed-host {name!r}: expected a host name, such as example.org")
    bound = _host_of(bound)
    if has_key and not is_loopback(bound) and not named:
        return None
    return frozenset({*LOOPBACK_HOSTS, bound, *map(_host_of, named)})


def host_check(hosts: Collection[str]) -> Check:
    """Return the check that the Host header is one of these names, or an IP address, with any port."""

    def check(scope: Scope, headers: Headers) -> None:
        got = headers.get("host", "")
        if _host_of(got) not in hosts and not _is_address(_host_of(got)):
            message = f"unknown Host {got[:100]!r}; use {', '.join(sorted(hosts))}, or start it with --allowed-host"
            raise ApiError(403, message, "host_not_allowed")

    return check


def _host_of(authority: str) -> str:
    """Return the normalized host of `name`, `name:port`, `[address]:port` or a bare IPv6 address."""
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
