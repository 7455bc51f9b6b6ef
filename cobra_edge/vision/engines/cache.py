"""Built engines: what identifies one, and the directory that keeps them.

An engine is machine code for one runtime version, one set of cards, one precision and one graph. It is used only where all of
these are what they were; anything else builds it again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import filelock
import msgspec
import platformdirs

from ...errors import InputError, MachineError
from ...ownership import distrusted, read_trusted
from ...precision import PrecisionName
from ...verified import first_changed

# What may become part of a file's name, and is shown: keys are read from files that others wrote.
_FORMS = {
    "version": re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}"),
    "capabilities": re.compile(r"\d{1,2}\.\d"),
    "onnx_sha256": re.compile(r"[0-9a-f]{64}"),
}
_RECORD_LIMIT_BYTES = 64 << 10
_CAPABILITIES_MOST, _CARD_LETTERS_MOST = 32, 300
# What writing into the cache meets; any other OSError is about something else, and says so itself.
_WRITE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENOTDIR, errno.EEXIST),
)
RuntimeName = Literal["tensorrt", "tensorrt-rtx"]


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine was built from and for.

    Attributes:
        runtime: "tensorrt" or "tensorrt-rtx".
        version: of the library that built it, such as "10.3.0"; another version does not read it.
        capabilities: CUDA compute capabilities it runs on, such as ("8.6", "8.9").
        precision: of the graph, a name of `precision.PRECISIONS`.
        onnx_sha256: over the graph and its external data, as `onnx_digest` makes it.
        stripped: whether the weights were left out, to be taken from the graph when the engine is opened.
        card: name and size of the one card it was timed on; empty where it is as good on any card of its capabilities.
    """

    runtime: RuntimeName
    version: str
    capabilities: tuple[str, ...]
    precision: PrecisionName
    onnx_sha256: str
    stripped: bool = False
    card: str = ""

    def __post_init__(self) -> None:
        """Raise InputError for a field that is no such thing."""
        named = [
            ("version", self.version),
            *(("capabilities", c) for c in self.capabilities),
            ("onnx_sha256", self.onnx_sha256),
        ]
        odd = [f"{name} {value[:80]!r}" for name, value in named if not _FORMS[name].fullmatch(value)]
        if odd:
            raise InputError(f"engine key: {odd[0]} is no such thing; export or build it again")
        if not 1 <= len(self.capabilities) <= _CAPABILITIES_MOST or len(self.card) > _CARD_LETTERS_MOST:
            raise InputError(
                f"engine key: {len(self.capabilities)} capabilities for a card of {len(self.card)} letters; build it again"
            )

    @property
    def stem(self) -> str:
        """File name without suffix: readable, and different wherever any field is."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        arch = "-".join("sm" + c.replace(".", "") for c in self.capabilities)
        return f"vision-{self.runtime}-{self.version}-{arch}-{self.precision}-{digest}"


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
        """Return a whole engine of exactly this key, or None where there is none; one is hashed once (`verified`).

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
