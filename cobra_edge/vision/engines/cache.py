"""Cache of built engines, keyed by `EngineKey`.

An engine is machine code for one runtime version, one set of GPUs, one precision and one graph. It is used only if all of these
match; otherwise it is rebuilt.
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
# Errors of writing into the cache; any other OSError has another cause, and its own message.
_WRITE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EEXIST),
)


class EngineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metadata file of an engine: its key, size and hash."""

    key: EngineKey
    bytes: int
    sha256: str


def onnx_digest(files: dict[str, str]) -> str:
    """Return one hash over the graph and its external data, from {file name: sha256} of the manifest."""
    return hashlib.sha256(msgspec.json.encode(sorted(files.items()))).hexdigest()


class EngineCache:
    """A directory of engines with atomic writes."""

    def __init__(self, directory: Path | None = None) -> None:
        """Use a directory; by default the user's cache."""
        self.directory = directory or platformdirs.user_cache_path("cobra_edge") / "engines"

    def engine(self, key: EngineKey) -> Path:
        """Return the path of a key's engine, existing or not."""
        return self.directory / f"{key.stem}.engine"

    def record(self, key: EngineKey) -> Path:
        """Return the path of its `EngineRecord`."""
        return self.directory / f"{key.stem}.json"

    def read(self, key: EngineKey) -> bytes | None:
        """Return the engine of exactly this key, or None if there is no intact one. It is hashed once (`hash_cache`).

        An engine is code: a file that another user can write is ignored.
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
        """Return whether an engine of this key was published; only `read` checks that it is intact."""
        return self.record(key).is_file() and self.engine(key).is_file()

    def publish(self, key: EngineKey, data: bytes | memoryview) -> Path:
        """Store an engine, its record last, so that a reader finds both or neither. Raises OSError."""
        record = EngineRecord(key, len(data), hashlib.sha256(data).hexdigest())
        self.replace(self.engine(key), data)
        self.replace(self.record(key), msgspec.json.encode(record))
        return self.engine(key)

    def replace(self, file: Path, data: bytes | memoryview) -> None:
        """Write a file of the cache atomically. Raises OSError."""
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
        """Let only one process at a time build the engine of a key. The lock is released when its holder ends, for any reason.

        Args:
            key: of the engine.
            waiting: called once if another process holds the lock; check for the engine again afterwards.

        Raises:
            MachineError: the directory cannot be written, or the block fails on a full disk or the like.
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
                f"{self.directory}: cannot store an engine ({error.strerror or error}); free some space, fix its permissions, "
                "or set XDG_CACHE_HOME to another directory"
            ) from error

    @contextmanager
    def building(self, key: EngineKey) -> Iterator[Path]:
        """Yield a hidden directory to build an engine in, removed at the end. The caller must hold the key's lock.

        Leftovers of killed builds of this key are removed first.
        """
        for kind in ("building", "partial"):
            for left in self.directory.glob(f".{kind}-{key.stem}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=f".building-{key.stem}-") as scratch:
            yield Path(scratch)
