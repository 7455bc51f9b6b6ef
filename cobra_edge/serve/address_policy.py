"""IP addresses: loopback, public (images may be fetched from them), and the network that a client's limits count for.

The tables are our own: `ipaddress.is_global` differs between versions of Python and ignores IPv4 addresses embedded in IPv6.

Source: https://www.iana.org/assignments/iana-ipv4-special-registry and .../iana-ipv6-special-registry
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.types import Scope

Address = IPv4Address | IPv6Address
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

_NOT_PUBLIC_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared between a provider's customers
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local; metadata services of clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")  # global unicast
_NOT_PUBLIC_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments; Teredo, which embeds an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which embeds an IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)
_MAPPED = IPv6Network("::ffff:0:0/96")  # IPv4-mapped
_NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 behind NAT64


def is_public(address: Address) -> bool:
    """Whether an address is a unicast address on the public internet; an embedded IPv4 address is checked itself."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    if address in _MAPPED or address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _PUBLIC_6 and not any(address in network for network in _NOT_PUBLIC_6)


def is_loopback(host: str) -> bool:
    """Whether a server on this address is reachable from this machine only."""
    return host in LOOPBACK_HOSTS or host.startswith("127.")


def client_of(scope: Scope) -> str:
    """Return the network that a request counts for; behind a proxy that is the proxy's."""
    client = scope.get("client")
    return client_network(client[0] if client else "")


def client_network(host: str) -> str:
    """Return the network that a client counts for: its IPv4 address, or the /64 of its IPv6 address."""
    try:
        address = ip_address(host.partition("%")[0])  # without the zone of a link-local address
    except ValueError:  # a Unix socket
        return host
    if isinstance(address, IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Network((address, 64), strict=False))
