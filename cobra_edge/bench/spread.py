"""A repeated measurement: the median of its rounds, the smallest and the largest value."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec


class Spread(msgspec.Struct, frozen=True):
    """Median, smallest and largest value, in the unit of the measurement."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> Spread:
        """Return the measurement in another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def cell(self, form: str) -> str:
        """Return "median (low–high)", each in this format."""
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


def spread(values: Sequence[float]) -> Spread:
    """Return the median, smallest and largest of at least one value."""
    return Spread(median(values), min(values), max(values))
