"""What was read before, remembered: states by the key of what they have read, the least recently used given up first.

A key names a whole prefix (the image, then each segment of the conversation), so a state that is found is exact: going on
from it is what reading everything again would have been.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..decode.decoder import DecoderState
from .prefix_cache_disk import PrefixCacheDisk

_ENTRY_BYTES = 512  # the key, and the objects around a state's arrays


@dataclass
class CacheCounts:
    """What became of the questions for a state, and of the states.

    Attributes:
        hits_memory, hits_disk: a state was found, there.
        misses: none was.
        evicted: states given up for others, in memory.
        refused_files: files that were not what was once written.
    """

    hits_memory: int = 0
    hits_disk: int = 0
    misses: int = 0
    evicted: int = 0
    refused_files: int = 0


class PrefixCache:
    """States in the host's memory up to a limit, over files where there are some; for one thread.

    Others may ask `holds`, and read the length and the figures: each is one step of the interpreter, and none walks over what
    that one thread changes.

    Attributes:
        size_bytes: what is kept in memory, never more than the limit.
        counts: since the start.
    """

    def __init__(self, limit_bytes: int, files: PrefixCacheDisk | None = None) -> None:
        """Begin empty; a limit of 0 keeps nothing in memory."""
        self._limit_bytes, self._files = limit_bytes, files
        self._kept: OrderedDict[bytes, DecoderState] = OrderedDict()  # the most recently used last
        self.size_bytes, self.counts = 0, CacheCounts()

    def __len__(self) -> int:
        """Return how many states are in memory."""
        return len(self._kept)

    def holds(self, keys: Iterable[bytes]) -> bool:
        """Say whether a state of one of these prefixes is in memory; it may be given up in the next moment."""
        return any(key in self._kept for key in keys)

    def longest(self, keys: Sequence[bytes]) -> tuple[int, DecoderState] | None:
        """Return the index of the longest prefix whose state is kept, and that state; None where none is.

        Args:
            keys: of ever longer prefixes, the shortest first. For each one longer than what memory has, a file is looked for:
                a system call where there is none, and a prompt has a few dozen segments at most.

        The state belongs to the cache and its arrays are read-only: `decoder.new_state(like=state)` goes on from it.
        """
        found = next((i for i in reversed(range(len(keys))) if keys[i] in self._kept), -1)
        for i in reversed(range(found + 1, len(keys))):
            state = self._from_disk(keys[i])
            if state is not None:
                self.counts.hits_disk += 1
                return i, state
        if found < 0:
            self.counts.misses += 1
            return None
        self.counts.hits_memory += 1
        self._kept.move_to_end(keys[found])
        return found, self._kept[keys[found]]

    def keep(self, key: bytes, state: DecoderState, *, on_disk: bool = False) -> None:
        """Keep a copy of a state, in memory where the limit has room for it, and in a file where it is to be on disk.

        A key that is kept already stands for the same state, which is not copied again.
        """
        kept = self._kept.get(key)
        if kept is None and (self._fits(state) or (on_disk and self._files)):
            kept = state.host()
            for array in (kept.conv, kept.ssm):
                array.flags.writeable = False
        if kept is not None:
            self._put(key, kept)
            if on_disk and self._files:
                self._files.save(key, kept)

    def _from_disk(self, key: bytes) -> DecoderState | None:
        if self._files is None:
            return None
        state = self._files.load(key)
        self.counts.refused_files = self._files.refused
        if state is not None:
            self._put(key, state)
        return state

    def _put(self, key: bytes, state: DecoderState) -> None:
        """Have a state as the most recently used one, if it is not too large by itself."""
        if not self._fits(state):
            return
        if key not in self._kept:
            while self.size_bytes + _size_of(state) > self._limit_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.size_bytes -= _size_of(oldest)
                self.counts.evicted += 1
            self._kept[key] = state
            self.size_bytes += _size_of(state)
        self._kept.move_to_end(key)

    def _fits(self, state: DecoderState) -> bool:
        return _size_of(state) <= self._limit_bytes


def _size_of(state: DecoderState) -> int:
    """Return the bytes a state takes, from its shapes alone: the arrays of one on a GPU would be copied."""
    return sum(int(np.prod(shape)) * np.dtype(np.float32).itemsize for shape in state.shapes) + _ENTRY_BYTES
