"""Work in a thread, so that it does not block the event loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import to_thread

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BYTES = 64 << 10  # takes less time than a switch to a thread


async def off_loop(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of the work, done in a thread where the data is large.

    Args:
        size_bytes: of the data.
        work: function whose time grows with the size.
        args, kwargs: its arguments.
    """
    if size_bytes <= SMALL_BYTES:
        return work(*args, **kwargs)
    return await to_thread.run_sync(partial(work, *args, **kwargs))
