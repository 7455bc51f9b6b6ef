"""A queue in which everybody's first comes before anybody's second."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several owners, who take turns; each owner's own in the order they came. Not for several threads by itself.

    An owner is a path of names, such as (address, user): an address's users take turns within the turns of the address, so that
    nobody gets more of them by giving more names.
    """

    def __init__(self) -> None:
        """Begin empty."""
        self._own: deque[T] = deque()
        self._rows: OrderedDict[str, FairQueue[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._own) + sum(map(len, self._rows.values()))

    def put(self, owner: tuple[str, ...], item: T) -> None:
        """Let an item wait."""
        if owner:
            self._rows.setdefault(owner[0], FairQueue()).put(owner[1:], item)
        else:
            self._own.append(item)

    def take(self) -> T:
        """Return the next item; its owner goes to the end of the row. Raises KeyError when nothing waits."""
        if self._own:
            return self._own.popleft()
        name, row = self._rows.popitem(last=False)
        item = row.take()
        if row:
            self._rows[name] = row
        return item

    def remove(self, owner: tuple[str, ...], item: T) -> bool:
        """Take an item out before its turn; False when it does not wait."""
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
        """Take all out."""
        items = [*self._own, *(item for row in self._rows.values() for item in row.clear())]
        self._own.clear()
        self._rows.clear()
        return items
