"""A figure as it is kept: the median of its rounds, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Return median, low and high of at least one value."""
    return {"median": median(values), "low": min(values), "high": max(values)}
