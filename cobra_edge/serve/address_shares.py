"""A resource that all clients share, with a limit per address."""

from __future__ import annotations

from collections import Counter


class AddressShares:
    """An amount in use, counted by address. Not thread-safe: use it on the event loop.

    Attributes:
        limit: of all addresses together.
        per_address: of one address.
    """

    def __init__(self, limit: int, per_address: int) -> None:
        """Begin with nothing in use."""
        self.limit, self.per_address = limit, per_address
        self._taken: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Amount in use."""
        return self._taken.total()

    def held_by(self, address: str) -> int:
        """Return the amount that an address uses."""
        return self._taken[address]

    def take(self, address: str, amount: int = 1) -> None:
        """Count an amount as used; the caller checks the limits."""
        self._taken[address] += amount

    def release(self, address: str, amount: int = 1) -> None:
        """Count an amount as free again."""
        self._taken[address] -= amount
        if not self._taken[address]:
            del self._taken[address]
