"""Where two replies part, for people to see."""

from __future__ import annotations

from dataclasses import dataclass

from ...terminal import plain

_BEFORE, _SHOWN = 240, 700  # characters shown of what is alike, and of each side from there on


@dataclass(frozen=True)
class Parted:
    """One reply, cut at the place from which it is another's no more.

    Attributes:
        alike: what both begin with; a long one is cut at its start.
        apart: the rest; empty where the other goes on and this one ends, or where both are alike.
        left_out: characters not shown, at either end.
    """

    alike: str
    apart: str
    left_out: int


def parted(reply: str, other: str) -> Parted:
    """Cut a reply at the first word in which it differs from another; control characters are replaced."""
    reply, other = plain(reply), plain(other)
    place = next((i for i, (a, b) in enumerate(zip(reply, other, strict=False)) if a != b), min(len(reply), len(other)))
    if reply != other:
        while place and not reply[place - 1].isspace():
            place -= 1
    alike, apart = reply[:place], reply[place:]
    first = max(0, len(alike) - _BEFORE) if apart or len(alike) > _SHOWN + _BEFORE else 0
    left_out = first + max(0, len(apart) - _SHOWN)
    return Parted(("…" if first else "") + alike[first:], apart[:_SHOWN] + ("…" if len(apart) > _SHOWN else ""), left_out)


def shortened(text: str, limit: int) -> str:
    """Return text on one line, control characters replaced, at most `limit` characters long."""
    text = plain(text).replace("\n", " ⏎ ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
