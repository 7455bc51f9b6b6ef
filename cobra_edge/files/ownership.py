"""Trusted files: owned by this user or root, and not writable by anyone else.

A cache or a state directory may be writable by other users, who could put wrong answers, or code, there.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_HAS_USERS = hasattr(os, "geteuid")  # not Windows
# Opens regular files only: follows no link, waits for no pipe.
ONLY_A_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY if _HAS_USERS else 0


def _trusted_users() -> set[int]:
    return {os.geteuid(), 0}


def distrusted(found: os.stat_result) -> str | None:
    """Return why a file is not trusted, or None if it is. No file is where the system does not tell who may write to it."""
    if not _HAS_USERS:
        return "this system does not tell who may write to it"
    if found.st_uid not in _trusted_users():
        return f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if found.st_mode & _OTHERS_WRITE:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}); chmod go-w"
    return None


def read_trusted(file: Path, most_bytes: int | None = None) -> bytes:
    """Return the content of a trusted file.

    Args:
        file: a regular file, not a link, pipe or device.
        most_bytes: read limit; None for all.

    Raises:
        OSError: it cannot be read; PermissionError if it is not trusted, with the reason.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | ONLY_A_FILE)) as stream:
        found = os.fstat(stream.fileno())
        reason = distrusted(found) if stat.S_ISREG(found.st_mode) else "not a regular file"
        if reason is not None:
            raise PermissionError(errno.EPERM, reason, str(file))
        return stream.read(-1 if most_bytes is None else most_bytes)
