"""A fair queue: owners take turns (round robin)."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several owners, first in, first out per owner. Not thread-safe.

    An owner is a path of names, such as (address, user): the users of an address share its turns, so that a client gets no more
    turns by using more user names.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._own: deque[T] = deque()
        self._rows: OrderedDict[str, FairQueue[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._own) + sum(map(len, self._rows.values()))

    def put(self, owner: tuple[str, ...], item: T) -> None:
        """Append an item."""
        if owner:
            self._rows.setdefault(owner[0], FairQueue()).put(owner[1:], item)
        else:
            self._own.append(item)

    def take(self) -> T:
        """Remove and return the next item; its owner goes to the end. Raises KeyError where the queue is empty."""
        if self._own:
            return self._own.popleft()
        name, row = self._rows.popitem(last=False)
        item = row.take()
        if row:
            self._rows[name] = row
        return item

    def remove(self, owner: tuple[str, ...], item: T) -> bool:
        """Remove an item; False where it is not in the queue."""
        if not owner:
            found = item in self._own
            if found:
                self._own.remove(item)
            return found
        row = self._rows.get(owner[0])
        if row is None or not row.remove(owner[1:], item):
            return False
        if not row:
            del self._rows[owner[0]]
        return True

    def clear(self) -> list[T]:
        """Remove and return all items."""
        items = [*self._own, *(item for row in self._rows.values() for item in row.clear())]
        self._own.clear()
        self._rows.clear()
        return items
