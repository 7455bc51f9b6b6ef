"""Prefix cache: decoder states by the key of the prefix that they have read, evicted least recently used first.

A key is a hash of the whole prefix (the image, then each segment of the conversation), so decoding from a cached state gives
the same result as reading the prefix again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..decode.decoder import DecoderState
from .prefix_cache_disk import PrefixCacheDisk

_ENTRY_BYTES = 512  # the key and the objects around the arrays


@dataclass
class CacheCounts:
    """Counts of a prefix cache.

    Attributes:
        hits_memory, hits_disk: lookups that found a state there.
        misses: lookups that found none.
        evicted: states evicted from memory.
        refused_files: damaged files on disk.
    """

    hits_memory: int = 0
    hits_disk: int = 0
    misses: int = 0
    evicted: int = 0
    refused_files: int = 0


class PrefixCache:
    """States in host memory up to a limit, with an optional second level on disk. For one thread.

    Other threads may call `holds` and read the length and the counts: each is one step of the interpreter.

    Attributes:
        size_bytes: size of the states in memory, at most the limit.
        counts: since the start.
    """

    def __init__(self, limit_bytes: int, files: PrefixCacheDisk | None = None) -> None:
        """Create an empty cache; a limit of 0 keeps nothing in memory."""
        self._limit_bytes, self._files = limit_bytes, files
        self._kept: OrderedDict[bytes, DecoderState] = OrderedDict()  # the most recently used last
        self.size_bytes, self.counts = 0, CacheCounts()

    def __len__(self) -> int:
        """Return the number of states in memory."""
        return len(self._kept)

    def holds(self, keys: Iterable[bytes]) -> bool:
        """Whether the state of one of these prefixes is in memory; it may be evicted at any time."""
        return any(key in self._kept for key in keys)

    def longest(self, keys: Sequence[bytes]) -> tuple[int, DecoderState] | None:
        """Return the index of the longest cached prefix and its state; None for a miss.

        Args:
            keys: of the prefixes, the shortest first. A file is looked up for each one longer than those in memory, one system
                call each; a prompt has a few dozen segments at most.

        The state belongs to the cache and its arrays are read-only: copy it with `decoder.new_state(like=state)`.
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
        """Store a copy of a state in memory, where it fits the limit, and on disk, where `on_disk` is set.

        A state whose key is in the cache is not copied again.
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
        """Insert a state as the most recently used one, unless it is larger than the limit."""
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
    """Return the size of a state in bytes, from its shapes: reading its arrays would copy them from a GPU."""
    return sum(int(np.prod(shape)) * np.dtype(np.float32).itemsize for shape in state.shapes) + _ENTRY_BYTES
