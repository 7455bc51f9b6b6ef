"""Staging: outputs appear whole or not at all, and never in the place of something that appeared in the meantime.

Work goes to a hidden directory beside the goal, which is renamed at the end. The directory is locked for as long as its process
lives (flock, which the kernel drops however the process ends), so the next run can tell what a killed one left behind from
what another one is working in. Nothing that is in the way at the end is lost: it stays, and so does what was made, under
another name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError, MachineError

log = logging.getLogger(__name__)

# What only writing meets; any other OSError inside a block is about a file that was read, and says so itself.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
_CAME = "appeared while this ran"
# A C library, kernel or file system without renameat2 or without the flag; EPERM is what a container's filter answers.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def _renameat2(source: Path, goal: Path, flag: int) -> bool:
    """Rename in one step as the flag says; False where that is not to be had here. Raises OSError as the system does."""
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
    """Exchange two files or directories in one step; False where the system cannot. Raises OSError as the system does."""
    return _renameat2(one, other, _EXCHANGE)


def rename_new(source: Path, goal: Path) -> None:
    """Give a file or directory a name that nothing has.

    Raises:
        FileExistsError: something has it. OSError as the system does.
    """
    if _renameat2(source, goal, _NOREPLACE):
        return
    # The name is taken in one step, by something empty; a rename then replaces that.
    if source.is_dir():
        os.mkdir(goal)
    else:
        os.close(os.open(goal, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.rename(source, goal)
    except OSError as error:  # somebody put something into the directory
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(goal)) from error


@contextmanager
def scratch_directory(goal: Path, kind: str = "partial") -> Iterator[Path]:
    """Give a hidden directory beside `goal`, gone at the end; the goal's own directory is made where it is missing.

    What killed processes left of the same kind for the same goal is removed first.

    Args:
        goal: what is being made.
        kind: part of the hidden name.

    Raises:
        InputError: the goal's directory cannot be written.
        MachineError: the block met a full disk or the like.
    """
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
        raise MachineError(f"{goal}: writing failed ({error.strerror}); nothing was kept") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)
        _remove_empty(created)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a directory and lock it; returns it and the descriptor that holds the lock. Raises OSError as the system does."""
    while True:
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        locked = _lock(descriptor)
        # Between the two calls another process may have taken it for a leftover.
        with suppress(OSError):
            if locked is not False and os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return directory, descriptor
        os.close(descriptor)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a directory that outlives a run, made where it is missing and gone again where it stays empty.

    Raises:
        InputError: another process holds it, or something else has its name.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{directory}: something else is there; move it or give another path") from error
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _lock(descriptor) is False:
            raise InputError(f"{directory}: another process is working there; wait for it, or give another path")
        yield
    finally:
        os.close(descriptor)
        _remove_empty([directory])


def _lock(descriptor: int) -> bool | None:
    """Lock a directory; False where another process holds it, None where this file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove directories of ours with that prefix that nobody holds any more."""
    with os.scandir(parent) as entries:
        left = [Path(e.path) for e in entries if e.name.startswith(prefix)]
    for directory in left:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # a file or a link of somebody else's, or gone
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _lock(descriptor):
                log.warning("%s: left by a run that was killed; removed", directory)
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(descriptor)


def _remove_empty(directories: list[Path]) -> None:
    """Remove directories that were made for an output, nearest first, as long as nothing is in them."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def keep_beside(made: Path, goal: Path, why: str) -> InputError:
    """Give what was made a free name beside the goal; returns the error that tells of it.

    Args:
        made: staged file or directory.
        goal: the name it cannot have.
        why: what is in the way.
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
        return InputError(f"{goal}: {why}, and stays as it is; what was made is kept as {kept}: rename it, or remove it")


def check_file_goal(file: Path, *, force: bool) -> None:
    """Raise InputError where a file may not be written: it is there and --force is missing, or it is a directory."""
    if file.is_dir() or (os.path.lexists(file) and not force):
        raise InputError(f"{file} is already there; give --force to replace a file, or another path")


@contextmanager
def staged_file(file: Path, *, force: bool) -> Iterator[Path]:
    """Give a path to write to; what is there when the block ends well takes the file's name, in one step.

    Args:
        file: the goal.
        force: replace a file that is there, at the beginning or by the end.

    Raises:
        InputError: as `check_file_goal` says; its directory cannot be written; or something took the name in the meantime:
            what was written is kept under another.
        MachineError: the disk is full.
    """
    check_file_goal(file, force=force)
    file = Path(os.path.realpath(file))  # a link stays one
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
    """Give a hidden directory that takes the goal's name when the block ends well; see `bundle.staged_directory`.

    Args:
        goal: where the directory shall be.
        force: replace a directory that holds `marker`; whatever else is there stays.
        marker: file by which a directory is known to be of our making.

    Raises:
        InputError: its directory cannot be written, or something that may not be replaced took the name in the meantime.
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
                os.rename(stage, goal)  # of a directory: replaces nothing but an empty one
        except OSError as error:
            came = error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
            raise keep_beside(stage, goal, _CAME if came else f"cannot be replaced ({error.strerror})") from error


def replaceable(directory: Path, marker: str) -> bool:
    """Tell whether a directory is there that may be replaced: it holds `marker`, or nothing."""
    return directory.is_dir() and ((directory / marker).is_file() or not any(directory.iterdir()))


def _replace(stage: Path, goal: Path, marker: str) -> None:
    """Put the stage in the place of the goal, in one step where the system can: the goal is never absent then."""
    if exchange(stage, goal):
        if not replaceable(stage, marker):  # something else had taken its place
            exchange(stage, goal)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(goal))
        return
    old = Path(tempfile.mkdtemp(dir=goal.parent, prefix=f".{goal.name}.old-"))
    aside = old / goal.name
    try:
        os.rename(goal, aside)
        os.rename(stage, goal)
    except BaseException:  # a Ctrl-C too
        if aside.exists() and not goal.exists():
            os.rename(aside, goal)
        raise
    finally:
        if goal.exists():
            shutil.rmtree(old, ignore_errors=True)


def _put_back(goal: Path) -> None:
    """Undo what a process that was killed between the two renames of `_replace` has done."""
    with suppress(OSError), os.scandir(goal.parent) as entries:
        for entry in entries:
            if entry.name.startswith(f".{goal.name}.old-") and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    rename_new(Path(entry.path) / goal.name, goal)
                    log.warning("%s: put back, a run that was killed had moved it aside", goal)
                with suppress(OSError):
                    os.rmdir(entry.path)
