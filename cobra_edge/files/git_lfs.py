"""Git LFS pointers: the few lines that replace a large file if git cloned a repository without LFS."""

from __future__ import annotations

from pathlib import Path

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Return whether a file is a Git LFS pointer. Raises OSError."""
    with file.open("rb") as stream:
        return stream.read(len(_FIRST_LINE)) == _FIRST_LINE


def pointer_message(file: Path) -> str:
    """Return the error message for a pointer, with what to do."""
    return f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}, or download the file"
