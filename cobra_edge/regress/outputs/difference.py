"""Where two replies part, for people to see."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from ...terminal.output import plain

_AROUND, _SHOWN = 240, 500  # characters shown before and after what differs, and of it


@dataclass(frozen=True)
class DiffedReply:
    """One reply, cut around the words in which it is not another's.

    Attributes:
        before, after: what both have.
        changed: what only this one says; empty where both are alike, or only the other says something there.
        omitted: characters not shown; an ellipsis stands where they were.
    """

    before: str
    changed: str
    after: str
    omitted: int


def diff_reply(reply: str, other: str) -> DiffedReply:
    """Cut a reply at the first and after the last word in which it differs from another; control characters are replaced."""
    reply, other = plain(reply), plain(other)
    start = _alike(reply, other)
    tail = _alike(reply[start:][::-1], other[start:][::-1])
    before, changed, after = reply[:start], reply[start : len(reply) - tail], reply[len(reply) - tail :]
    if reply == other:
        before, after = "", reply
    limit = _AROUND if changed or before else 2 * _AROUND + _SHOWN
    kept = (before[-_AROUND:], changed[:_SHOWN], after[:limit])
    omitted = len(reply) - sum(map(len, kept))
    lead = "…" if len(before) > len(kept[0]) else ""
    return DiffedReply(lead + kept[0], _ended(kept[1], changed), _ended(kept[2], after), omitted)


def _ended(kept: str, full: str) -> str:
    return kept if kept == full else f"{kept}…"


def _alike(a: str, b: str) -> int:
    """Return how many characters both begin with, up to where a word of both ends."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    while same and not a[same - 1].isspace() and any(same < len(text) and not text[same].isspace() for text in (a, b)):
        same -= 1
    return same


def shortened(text: str, limit: int) -> str:
    """Return text on one line, control characters replaced, at most `limit` characters long."""
    text = plain(text).replace("\n", " ⏎ ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
