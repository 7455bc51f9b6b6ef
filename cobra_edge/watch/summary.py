"""Summary of a watch: frames, latencies, memory growth."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from .answers import FrameAnswer

LATENCIES_KEPT = 10_000  # bounded: a watch may run for weeks


class Spread(msgspec.Struct, frozen=True):
    """Median and 95th percentile, in ms."""

    median: float
    p95: float

    @classmethod
    def of(cls, values: deque[float]) -> Spread | None:
        """Return the spread of some values; None for no values."""
        return cls(*(float(v) for v in np.percentile(np.array(values), (50, 95)))) if values else None


class Summary(msgspec.Struct, frozen=True):
    """Summary of a watch.

    Attributes:
        answered, dropped: numbers of answered and dropped frames.
        unreadable: number of unreadable images; those that were frames count as dropped too.
        first_token_ms, answer_ms: latencies from a frame's capture, over the last LATENCIES_KEPT frames; None for no frame.
        resident_bytes_start: memory of the process after the first answer; None for no answer, or on an unsupported system.
        resident_bytes_end: memory at the end.
    """

    answered: int
    dropped: int
    unreadable: int
    first_token_ms: Spread | None
    answer_ms: Spread | None
    resident_bytes_start: int | None
    resident_bytes_end: int | None


class Aggregate:
    """Aggregates answers in constant memory."""

    def __init__(self) -> None:
        """Begin without answers."""
        self.answered, self.dropped = 0, 0
        self._first: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._decode: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._resident_start: int | None = None

    def add(self, answer: FrameAnswer) -> None:
        """Add an answer."""
        self.answered += 1
        self.dropped += answer.dropped
        self._decode.append(answer.answer_ms)
        if answer.first_token_ms is not None:
            self._first.append(answer.first_token_ms)
        if self.answered == 1:
            self._resident_start = resident_bytes()

    def summary(self, unreadable: int) -> Summary:
        """Return the summary, with a number of unreadable images."""
        spreads = Spread.of(self._first), Spread.of(self._decode)
        return Summary(self.answered, self.dropped, unreadable, *spreads, self._resident_start, resident_bytes())


def resident_bytes() -> int | None:
    """Return the resident memory of this process, mapped files included; None on a system without /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return None
