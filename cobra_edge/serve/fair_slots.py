"""Slots shared fairly: a limit per owner, and waiting owners take turns."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """Slots. Not thread-safe: use it on the event loop."""

    def __init__(self, slots: int, per_owner: int) -> None:
        """Begin with all slots free.

        Args:
            slots: their number, at least 1.
            per_owner: maximum that one owner holds, even where others are free.
        """
        self._slots, self._per_owner = slots, per_owner
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def hold(self, owner: str) -> AsyncIterator[None]:
        """Wait for the owner's turn, and hold a slot."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(owner, turn)
            else:  # granted at the same moment
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
