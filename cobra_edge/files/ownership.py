"""Whose files are believed: this user's or root's, that nobody else may write to.

A cache or a directory of states may lie where others write too. What they put there could be another answer, or code.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Nothing is opened but a file: no link is followed, and no pipe waited for.
ONLY_A_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def _believed_users() -> set[int]:
    return {os.geteuid(), 0}


def distrusted(found: os.stat_result) -> str | None:
    """Return why what was found is not believed, None where it is."""
    if found.st_uid not in _believed_users():
        return f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if found.st_mode & _OTHERS_WRITE:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); chmod go-w"
    return None


def read_trusted(file: Path, most_bytes: int | None = None) -> bytes:
    """Return what a file holds that is believed.

    Args:
        file: no link, pipe or device.
        most_bytes: more are not read; None for all.

    Raises:
        OSError: it cannot be read; PermissionError says why it is not believed.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | ONLY_A_FILE)) as stream:
        found = os.fstat(stream.fileno())
        reason = distrusted(found) if stat.S_ISREG(found.st_mode) else "not a regular file"
        if reason is not None:
            raise PermissionError(errno.EPERM, reason, str(file))
        return stream.read(-1 if most_bytes is None else most_bytes)
