"""A queue in which everybody's first comes before anybody's second."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several owners, who take turns; each owner's own in the order they came. Not for several threads by itself."""

    def __init__(self) -> None:
        """Begin empty."""
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def put(self, owner: str, item: T) -> None:
        """Let an item wait."""
        self._waiting.setdefault(owner, deque()).append(item)

    def take(self) -> T:
        """Return the next item; its owner goes to the end of the row. Raises KeyError when nothing waits."""
        owner, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[owner] = items
        return item

    def remove(self, owner: str, item: T) -> bool:
        """Take an item out before its turn; False when it does not wait."""
        items = self._waiting.get(owner, deque())
        if item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[owner]
        return True

    def clear(self) -> list[T]:
        """Take all out."""
        items = [item for each in self._waiting.values() for item in each]
        self._waiting.clear()
        return items
