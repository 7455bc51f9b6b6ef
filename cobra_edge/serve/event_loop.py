"""What keeps the event loop free for everybody else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import to_thread

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BYTES = 64 << 10  # decoded or looked at in less time than a thread takes to begin


async def off_loop(size_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what the work comes to, done in a thread where there is much of it.

    Args:
        size_bytes: of what is worked on.
        work: whose time grows with that.
        args, kwargs: its arguments.
    """
    if size_bytes <= SMALL_BYTES:
        return work(*args, **kwargs)
    return await to_thread.run_sync(partial(work, *args, **kwargs))
