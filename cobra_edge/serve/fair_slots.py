"""A few slots that several owners share: nobody holds more than so many, and owners that wait are served in turns."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """Slots for the event loop alone."""

    def __init__(self, slots: int, per_owner: int) -> None:
        """Begin with all slots free.

        Args:
            slots: there are, at least 1.
            per_owner: at most so many are held by one owner, even where others are free.
        """
        self._slots, self._per_owner = slots, per_owner
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """Hold a slot, as soon as it is the owner's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner, turn)
            else:  # it was granted in the same moment
                self._release(owner)
            raise
        try:
            yield
        finally:
            self._release(owner)

    def _release(self, owner: str) -> None:
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._grant()

    def _grant(self) -> None:
        while self._held.total() < self._slots:
            owner = next((o for o in self._waiting if self._held[o] < self._per_owner), None)
            if owner is None:
                return
            turn = self._waiting[owner].popleft()
            self._waiting.move_to_end(owner)
            if not self._waiting[owner]:
                del self._waiting[owner]
            if not turn.cancelled():
                self._held[owner] += 1
                turn.set_result(None)

    def _forget(self, owner: str, turn: asyncio.Future[None]) -> None:
        row = self._waiting.get(owner)
        if row is not None and turn in row:
            row.remove(turn)
            if not row:
                del self._waiting[owner]
