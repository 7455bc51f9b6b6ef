"""What a watch comes to: how many frames, how late the answers were, and whether memory grew."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from .answers import FrameAnswer

LATENCIES_KEPT = 10_000  # a watch may go on for weeks, in the memory that it began with


class Spread(msgspec.Struct, frozen=True):
    """Median and 95th percentile, in ms."""

    median: float
    p95: float

    @classmethod
    def of(cls, values: deque[float]) -> Spread | None:
        """Return them of some values; None of none."""
        return cls(*(float(v) for v in np.percentile(np.array(values), (50, 95)))) if values else None


class Summary(msgspec.Struct, frozen=True):
    """A watch that has ended.

    Attributes:
        answered, dropped: frames that were answered, and that were let go between two of those.
        unreadable: images that could not be looked at; those that were frames are among the dropped ones too.
        first_token_ms, answer_ms: from a frame's capture, over the last LATENCIES_KEPT frames; None for no frame.
        resident_bytes_start: of the process after the first answer, when all that is made once has been made; None where there
            was no answer, or the system does not say.
        resident_bytes_end: at the end.
    """

    answered: int
    dropped: int
    unreadable: int
    first_token_ms: Spread | None
    answer_ms: Spread | None
    resident_bytes_start: int | None
    resident_bytes_end: int | None


class Aggregate:
    """Takes answers as they come; of a fixed size."""

    def __init__(self) -> None:
        """Begin with none."""
        self.answered, self.dropped = 0, 0
        self._first: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._whole: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._resident_start: int | None = None

    def add(self, answer: FrameAnswer) -> None:
        """Count one."""
        self.answered += 1
        self.dropped += answer.dropped
        self._whole.append(answer.answer_ms)
        if answer.first_token_ms is not None:
            self._first.append(answer.first_token_ms)
        if self.answered == 1:
            self._resident_start = resident_bytes()

    def summary(self, unreadable: int) -> Summary:
        """Return what it comes to now, with so many images that could not be looked at."""
        spreads = Spread.of(self._first), Spread.of(self._whole)
        return Summary(self.answered, self.dropped, unreadable, *spreads, self._resident_start, resident_bytes())


def resident_bytes() -> int | None:
    """Return how much memory this process has, pages of mapped files included; None where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    return None
