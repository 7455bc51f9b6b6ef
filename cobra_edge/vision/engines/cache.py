"""Built engines: what identifies one, and the directory that keeps them.

An engine is machine code for one runtime version, one set of cards, one precision and one graph. It is used only where all of
these are what they were; anything else builds it again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import msgspec
import platformdirs


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

    runtime: str
    version: str
    capabilities: tuple[str, ...]
    precision: str
    onnx_sha256: str
    stripped: bool = False
    card: str = ""

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
        """Return a whole engine of exactly this key, or None where there is none."""
        try:
            record = msgspec.json.decode(self.record(key).read_bytes(), type=EngineRecord)
            data = self.engine(key).read_bytes()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        whole = record.key == key and len(data) == record.bytes and hashlib.sha256(data).hexdigest() == record.sha256
        return data if whole else None

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
        """Write a file of the cache in one step."""
        self.directory.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=self.directory, prefix=".partial-")
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
        """
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
