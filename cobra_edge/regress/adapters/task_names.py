"""Names of tasks: parsed, and checked against those of a library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ...errors import InputError


def names_of(tasks: str) -> list[str]:
    """Return the names in a comma-separated list. Raises InputError if there are none."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task; give at least one, for example --tasks arc_easy")
    return names


def require_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for a task that the library does not know; of its thousands of names, only near matches are listed."""
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";"
            raise InputError(f"unknown task {task!r}{hint} {len(known)} are known; --include-path adds a directory of your own")
