"""How this process gets memory from Linux, for work on large tensors."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let malloc keep what is freed and give it out again, instead of returning large blocks to the system at once.

    glibc maps each block above 32 MiB anew and unmaps it when it is freed, so the system clears every page of every temporary
    tensor of a large model again: half of the time of passes through layers of Cobra's width. For commands that run a float
    model and end; does nothing where malloc is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
