"""Differences between two replies, for display."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from ...terminal.output import plain

_CONTEXT, _SHOWN = 240, 500  # characters shown before and after the difference, and of it


@dataclass(frozen=True)
class DiffedReply:
    """One reply, split at the words in which it differs from another.

    Attributes:
        before, after: what both have in common.
        changed: what only this one has; empty if the two are equal, or only the other has something there.
        omitted: number of characters not shown; an ellipsis replaces them.
    """

    before: str
    changed: str
    after: str
    omitted: int


def diff_reply(reply: str, other: str) -> DiffedReply:
    """Split a reply before the first and after the last word that differs from another; control characters are replaced."""
    reply, other = plain(reply), plain(other)
    start = _shared_prefix(reply, other)
    tail = _shared_prefix(reply[start:][::-1], other[start:][::-1])
    before, changed, after = reply[:start], reply[start : len(reply) - tail], reply[len(reply) - tail :]
    if reply == other:
        before, after = "", reply
    limit = _CONTEXT if changed or before else 2 * _CONTEXT + _SHOWN
    kept = (before[-_CONTEXT:], changed[:_SHOWN], after[:limit])
    omitted = len(reply) - sum(map(len, kept))
    lead = "…" if len(before) > len(kept[0]) else ""
    return DiffedReply(lead + kept[0], _with_ellipsis(kept[1], changed), _with_ellipsis(kept[2], after), omitted)


def _with_ellipsis(kept: str, full: str) -> str:
    return kept if kept == full else f"{kept}…"


def _shared_prefix(a: str, b: str) -> int:
    """Return the length of the shared prefix in characters, cut to whole words."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    while same and not a[same - 1].isspace() and any(same < len(text) and not text[same].isspace() for text in (a, b)):
        same -= 1
    return same


def shortened(text: str, limit: int) -> str:
    """Return text on one line of at most `limit` characters, with control characters replaced."""
    text = plain(text).replace("\n", " ⏎ ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
