"""Atomic writes: an output appears complete or not at all, and never replaces something that appeared in the meantime.

Work goes to a hidden directory next to the goal, which is renamed at the end. The directory is locked while its process lives
(flock, which the kernel releases however the process ends), so that the next run can tell leftovers of a killed run from the
directory of a running one. If something appears at the goal meanwhile, it is kept, and the output gets another name.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, MachineError

try:
    import fcntl
except ImportError:  # Windows, where bundles run but nothing is written in a directory of its own
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# Errors of writing only; any other OSError inside a block is about a file that was read, and has its own message.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
_CAME = "appeared while this ran"
# A C library, kernel or file system without renameat2 or without the flag; EPERM comes from a container's seccomp filter.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def _renameat2(source: Path, goal: Path, flag: int) -> bool:
    """Call renameat2 with a flag; False if it is not supported here. Raises OSError."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(goal), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(goal))


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or directories atomically; False if that is not supported. Raises OSError."""
    return _renameat2(one, other, _EXCHANGE)


def rename_new(source: Path, goal: Path) -> None:
    """Rename a file or directory to a name that must not exist.

    Raises:
        FileExistsError: the name exists. OSError: renaming failed.
    """
    if _renameat2(source, goal, _NOREPLACE):
        return
    # Reserve the name atomically with something empty, which the rename then replaces.
    if source.is_dir():
        os.mkdir(goal)
    else:
        os.close(os.open(goal, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.rename(source, goal)
    except OSError as error:  # the reserved directory is no longer empty
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(goal)) from error


@contextmanager
def scratch_directory(goal: Path, kind: str = "partial") -> Iterator[Path]:
    """Yield a hidden directory next to `goal`, removed at the end; missing parents are created.

    Leftovers of killed processes, of the same kind for the same goal, are removed first.

    Args:
        goal: path of the output.
        kind: part of the hidden name.

    Raises:
        InputError: the parent directory is not writable.
        MachineError: the block failed on a full disk or the like.
    """
    _require_locks()
    parent, prefix = goal.absolute().parent, f".{goal.name}.{kind}-"
    created = [p for p in (parent, *parent.parents) if not os.path.lexists(p)]  # nearest first
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, prefix)
        scratch, lock = _locked_directory(parent, prefix)
    except OSError as error:
        _remove_empty(created)
        raise InputError(f"{parent}: cannot be written ({error.strerror}); give another path") from error
    try:
        yield scratch
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise MachineError(f"{goal}: writing failed ({error.strerror}); no output was kept") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)
        _remove_empty(created)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """Create and lock a directory; returns it and the descriptor that holds the lock. Raises OSError."""
    while True:
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        descriptor = _open_directory(directory)
        locked = _lock(descriptor)
        # Between the two calls another process may have removed it as a leftover.
        with suppress(OSError):
            if locked is not False and os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return directory, descriptor
        os.close(descriptor)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Create and lock a directory that persists after the run, unless it stays empty.

    Raises:
        InputError: another process has locked it, or it is not a directory.
        MachineError: the system has no such locks.
    """
    _require_locks()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{directory}: exists and is not a directory; move it or give another path") from error
    descriptor = _open_directory(directory)
    try:
        if _lock(descriptor) is False:
            raise InputError(f"{directory}: in use by another process; wait for it, or give another path")
        yield
    finally:
        os.close(descriptor)
        _remove_empty([directory])


def _require_locks() -> None:
    """Raise MachineError where the system has no locks that end with their process."""
    if fcntl is None:
        raise MachineError("writing an output needs flock, which this system lacks; use Linux, macOS, or WSL on Windows")


def _open_directory(directory: Path, flags: int = 0) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | flags)


def _lock(descriptor: int) -> bool | None:
    """Lock a directory; False if another process holds it, None if the file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove our directories with that prefix that no process has locked."""
    with os.scandir(parent) as entries:
        left = [Path(e.path) for e in entries if e.name.startswith(prefix)]
    for directory in left:
        try:
            descriptor = _open_directory(directory, os.O_NOFOLLOW)
        except OSError:  # a file, a link, or already removed
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                log.warning("%s: left by a killed run; removed", directory)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories that were created for an output, innermost first, while they are empty."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def keep_beside(made: Path, goal: Path, why: str) -> InputError:
    """Rename an output to a free name next to the goal; returns the error that reports it.

    Args:
        made: staged file or directory.
        goal: the path that it cannot have.
        why: the reason.
    """
    suffix = "" if made.is_dir() else goal.suffix
    stem, number = goal.name.removesuffix(suffix), 2
    while True:
        kept = goal.with_name(f"{stem}-{number}{suffix}")
        try:
            rename_new(made, kept)
        except FileExistsError:
            number += 1
            continue
        return InputError(f"{goal}: {why}, and is left unchanged; the output is kept as {kept}: rename it, or remove it")


def check_file_goal(file: Path, *, force: bool) -> None:
    """Raise InputError if a file must not be written: it exists and --force is missing, or it is a directory."""
    if file.is_dir() or (os.path.lexists(file) and not force):
        raise InputError(f"{file} is already there; give --force to replace a file, or another path")


@contextmanager
def staged_file(file: Path, *, force: bool) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `file` atomically if the block succeeds.

    Args:
        file: the destination.
        force: replace an existing file.

    Raises:
        InputError: see `check_file_goal`; its directory is not writable; or the file appeared in the meantime: then the output
            is kept under another name.
        MachineError: the disk is full.
    """
    check_file_goal(file, force=force)
    file = Path(os.path.realpath(file))  # a link is kept, its target replaced
    with scratch_directory(file) as scratch:
        staged = scratch / file.name
        yield staged
        rename: Callable[[Path, Path], None] = os.replace if force else rename_new
        try:
            rename(staged, file)
        except (FileExistsError, IsADirectoryError) as error:
            raise keep_beside(staged, file, _CAME) from error


@contextmanager
def staged_bundle(goal: Path, *, force: bool, marker: str) -> Iterator[Path]:
    """Yield a hidden directory that is renamed to `goal` if the block succeeds; see `bundle.reader.staged_directory`.

    Args:
        goal: the destination.
        force: replace a directory that contains `marker`; nothing else is replaced.
        marker: file that identifies a directory as our output.

    Raises:
        InputError: its parent is not writable, or something that must not be replaced appeared in the meantime.
        MachineError: the disk is full.
    """
    goal = Path(os.path.realpath(goal))
    _put_back(goal)
    with scratch_directory(goal) as stage:
        yield stage
        stage.chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        try:
            if force and replaceable(goal, marker):
                _replace(stage, goal, marker)
            else:
                os.rename(stage, goal)  # a directory replaces only an empty directory
        except OSError as error:
            came = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
            raise keep_beside(stage, goal, _CAME if came else f"cannot be replaced ({error.strerror})") from error


def replaceable(directory: Path, marker: str) -> bool:
    """Return whether a directory exists that may be replaced: it contains `marker`, or nothing."""
    return directory.is_dir() and ((directory / marker).is_file() or not any(directory.iterdir()))


def _replace(stage: Path, goal: Path, marker: str) -> None:
    """Replace the goal by the stage; atomically if the system supports it, so that the goal always exists."""
    if exchange(stage, goal):
        if not replaceable(stage, marker):  # something else had appeared there
            exchange(stage, goal)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(goal))
        return
    old = Path(tempfile.mkdtemp(dir=goal.parent, prefix=f".{goal.name}.old-"))
    aside = old / goal.name
    try:
        os.rename(goal, aside)
        os.rename(stage, goal)
    except BaseException:  # including Ctrl-C
        if aside.exists() and not goal.exists():
            os.rename(aside, goal)
        raise
    finally:
        if goal.exists():
            shutil.rmtree(old, ignore_errors=True)


def _put_back(goal: Path) -> None:
    """Restore the goal after a process was killed between the two renames of `_replace`."""
    with suppress(OSError), os.scandir(goal.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{goal.name}.old-") and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    rename_new(Path(entry.path) / goal.name, goal)
                    log.warning("%s: restored; a killed run had moved it aside", goal)
                with suppress(OSError):
                    os.rmdir(entry.path)
