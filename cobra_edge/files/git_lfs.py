"""Git LFS pointers: the few lines that lie in the place of a large file where git cloned a repository without its contents."""

from __future__ import annotations

from pathlib import Path

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"


def is_pointer(file: Path) -> bool:
    """Return whether a file is such a pointer. Raises OSError as the file system does."""
    with file.open("rb") as stream:
        return stream.read(len(_FIRST_LINE)) == _FIRST_LINE


def pointer_message(file: Path) -> str:
    """Return what to tell of a pointer, and what to do."""
    return f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}, or download the file"
