"""Built engines: what identifies one, and the directory that keeps them.

An engine is machine code for one runtime version, one set of GPUs, one precision and one graph. It is used only where all of
these are what they were; anything else builds it again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import msgspec
import platformdirs

from ...bundle.engine_key import EngineKey
from ...bundle.hash_cache import first_changed
from ...errors import InputError, MachineError
from ...files.ownership import distrusted, read_trusted

_RECORD_LIMIT_BYTES = 64 << 10
# What writing into the cache meets; any other OSError is about something else, and says so itself.
_WRITE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EEXIST),
)


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lies beside an engine: its key, size and hash."""

    key: EngineKey
    bytes: int
    sha256: str


def onnx_digest(files: dict[str, str]) -> str:
    """Return one hash over the graph and its data from {file name: sha256}, as a manifest has them."""
    return hashlib.sha256(msgspec.json.encode(sorted(files.items()))).hexdigest()


class EngineCache:
    """A directory of engines; every file appears whole or not at all."""

    def __init__(self, directory: Path | None = None) -> None:
        """Take a directory; by default the user's cache."""
        self.directory = directory or platformdirs.user_cache_path("cobra_edge") / "engines"

    def engine(self, key: EngineKey) -> Path:
        """Return where the engine of a key lies, or would lie."""
        return self.directory / f"{key.stem}.engine"

    def record(self, key: EngineKey) -> Path:
        """Return where its record lies."""
        return self.directory / f"{key.stem}.json"

    def read(self, key: EngineKey) -> bytes | None:
        """Return a whole engine of exactly this key, or None where there is none; one is hashed once (`hash_cache`).

        An engine is code. One that another user could have written is none.
        """
        try:
            record = msgspec.json.decode(read_trusted(self.record(key), _RECORD_LIMIT_BYTES), type=EngineRecord)
            file = self.engine(key)
            found = file.lstat()
            if record.key != key or found.st_size != record.bytes:
                return None
            if not stat.S_ISREG(found.st_mode) or distrusted(found) or first_changed([(file, record.sha256)]) is not None:
                return None
            return read_trusted(file)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, InputError):
            return None

    def has(self, key: EngineKey) -> bool:
        """Return whether an engine of this key was published; only `read` looks whether it is whole."""
        return self.record(key).is_file() and self.engine(key).is_file()

    def publish(self, key: EngineKey, data: bytes | memoryview) -> Path:
        """Keep an engine, the record last: a reader finds both or takes neither. Raises OSError as the file system does."""
        record = EngineRecord(key, len(data), hashlib.sha256(data).hexdigest())
        self.replace(self.engine(key), data)
        self.replace(self.record(key), msgspec.json.encode(record))
        return self.engine(key)

    def replace(self, file: Path, data: bytes | memoryview) -> None:
        """Write a file of the cache in one step. Raises OSError as the file system does."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=self.directory, prefix=f".partial-{file.name}-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, file)
        except BaseException:
            os.unlink(draft)
            raise

    @contextmanager
    def locked(self, key: EngineKey, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Let one process at a time build the engine of a key; the lock is gone when its holder is, however it ended.

        Args:
            key: of the engine.
            waiting: called once where another process holds the lock; look again for the engine after that.

        Raises:
            MachineError: the directory cannot be written, or what is done in it under the lock meets a full disk or the like.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.directory / f"{key.stem}.lock")
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                waiting()
                lock.acquire()
            try:
                yield
            finally:
                lock.release()
        except OSError as error:
            if error.errno not in _WRITE_ERRORS:
                raise
            raise MachineError(
                f"{self.directory}: no engine can be kept there ({error.strerror or error}); free some space, mend its rights, "
                "or set XDG_CACHE_HOME to another directory"
            ) from error

    @contextmanager
    def building(self, key: EngineKey) -> Iterator[Path]:
        """Give a hidden directory to build an engine in, gone at the end; only for who holds the key's lock.

        What builders of this key left that were killed goes first.
        """
        for kind in ("building", "partial"):
            for left in self.directory.glob(f".{kind}-{key.stem}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=f".building-{key.stem}-") as scratch:
            yield Path(scratch)
