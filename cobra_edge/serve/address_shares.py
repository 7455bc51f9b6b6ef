"""What all clients share, and how much of it one address has: a share leaves the rest to the others."""

from __future__ import annotations

from collections import Counter


class AddressShares:
    """A quantity, counted by address. For the event loop alone.

    Attributes:
        limit: of all addresses together.
        per_address: of one.
    """

    def __init__(self, limit: int, per_address: int) -> None:
        """Begin with nothing taken."""
        self.limit, self.per_address = limit, per_address
        self._taken: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """How much is taken."""
        return self._taken.total()

    def held_by(self, address: str) -> int:
        """Return how much an address has."""
        return self._taken[address]

    def take(self, address: str, amount: int = 1) -> None:
        """Count an amount as taken, whatever the limits say."""
        self._taken[address] += amount

    def release(self, address: str, amount: int = 1) -> None:
        """Count it no more."""
        self._taken[address] -= amount
        if not self._taken[address]:
            del self._taken[address]
