"""Prefix cache on disk: states survive a restart, so an image is encoded only once.

One safetensors file per state, `directory/fingerprint/key.safetensors`; the fingerprint identifies the bundle and its runtimes.
The header's metadata has key, fingerprint and the SHA-256 of the values, and a file is accepted only where it equals, byte for
byte, what would be written for those values: a flipped bit, a truncated file or another model's state is rejected and removed.
Therefore a write does not call fsync: what a power cut leaves is rejected later. Files are renamed into place when complete, so
several servers of one user may share a directory; each may exceed the limit by one file for a moment. Only files that this
module may have written are removed, no link is followed, and nothing is read that another user could have written: directories
and files must belong to this user or root, and only they may have write permission.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..decode.decoder import DecoderState
from ..errors import InputError
from ..files.ownership import ONLY_A_FILE, distrusted
from ..formats.model_config import MambaConfig
from ..formats.safetensors_file import safetensors_header

log = logging.getLogger(__name__)

_FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")
_WHOLE, _TEMPORARY = re.compile(r"[0-9a-f]{64}\.safetensors"), re.compile(r"[0-9a-f]{64}\.[a-z0-9_]{8}\.part")
_ABANDONED_SECONDS = 60.0  # a write takes less


class _NotAsWritten(Exception):
    """A file differs from what was written; the message says how."""


@dataclass(frozen=True)
class _Found:
    """A file of the cache, of any bundle."""

    used_seconds: float
    size_bytes: int
    path: Path


class PrefixCacheDisk:
    """States of one bundle in a directory shared with other bundles; the least recently used of all is removed first.

    Attributes:
        refused: number of damaged or unreadable files.
    """

    def __init__(
        self, directory: Path, limit_bytes: int, config: MambaConfig, fingerprint: str, most_tokens: int = 1 << 20
    ) -> None:
        """Create the directory if necessary.

        Args:
            directory: for the states of all bundles.
            limit_bytes: total size of the files in it.
            config: of the decoder; sets the size of a state.
            fingerprint: hexadecimal; differs wherever states may.
            most_tokens: context length of the model; a state of more tokens is rejected.

        Raises:
            InputError: not writable, writable for others, or the limit is less than one state.
        """
        assert _FINGERPRINT.fullmatch(fingerprint)
        self._directory, self._own, self._fingerprint = directory, directory / fingerprint, fingerprint
        self._most_tokens = most_tokens
        self._limit_bytes, self._layout = limit_bytes, DecoderState.layout(config)
        self._values_bytes = sum(t.n_bytes for t in self._layout)
        self._file_bytes = len(self._head(bytes(32), b"")) + self._values_bytes
        self.refused, self._ignored, self._failing = 0, set[str](), False
        if limit_bytes < self._file_bytes:
            raise InputError(
                f"{directory}: the limit is {limit_bytes} bytes, but one state of this model takes {self._file_bytes}; "
                "raise the limit, or leave out --state-dir"
            )
        try:
            self._make_directories()
            with tempfile.TemporaryFile(dir=self._own):
                pass
        except OSError as error:
            raise InputError(
                f"{directory}: not usable for the prefix cache ({error}); give a directory that you can write to"
            ) from error

    def load(self, key: bytes) -> DecoderState | None:
        """Return the state of a key (32 bytes), its arrays read-only; None where there is no valid file."""
        file = self._file_of(key)
        if file.name in self._ignored:
            return None
        try:
            self._require_own_directories()
        except FileNotFoundError:
            return None
        except OSError as error:  # not ours to remove
            self.refused += 1
            self._ignored.add(file.name)
            log.warning("%s: ignored (%s)", file, error)
            return None
        try:
            return self._state(key, self._read(file))
        except FileNotFoundError:
            return None
        except (OSError, _NotAsWritten) as error:
            self.refused += 1
            removed = _remove(file)
            log.warning("%s: %s; %s", file, error, "removed" if removed else "left in place and ignored")
            if not removed:
                self._ignored.add(file.name)
            return None

    def save(self, key: bytes, state: DecoderState) -> None:
        """Write the state of a key (32 bytes) unless it is on disk; a failure is logged, once for consecutive failures."""
        file = self._file_of(key)
        try:
            self._make_directories()
            if not self._is_taken(file):
                self._make_room()
                self._write(file, key, state)
                self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s: a state could not be saved (%s); further failures are not logged", file, error)
            self._failing = True

    def _file_of(self, key: bytes) -> Path:
        assert len(key) == 32
        return self._own / f"{key.hex()}.safetensors"

    def _make_directories(self) -> None:
        """Create both directories if necessary. Raises OSError where something else is there."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own.mkdir(mode=0o700, exist_ok=True)
        self._require_own_directories()

    def _require_own_directories(self) -> None:
        """Raise OSError where a directory is another user's, is writable for others, or is a link (the first may be one)."""
        if self._own.is_symlink():
            raise NotADirectoryError(f"{self._own} is a link; remove it")
        for directory in (self._directory, self._own):
            if reason := distrusted(directory.stat()):
                raise PermissionError(f"{directory}: {reason}")

    def _head(self, key: bytes, *values: bytes | memoryview) -> bytes:
        """Return the header of the file of some values; its length is constant."""
        digest = hashlib.sha256()
        for part in values:
            digest.update(part)
        return safetensors_header(
            self._layout, {"key": key.hex(), "fingerprint": self._fingerprint, "values_sha256": digest.hexdigest()}
        )

    def _read(self, file: Path) -> bytes:
        """Return the content of a file of the expected size. Raises OSError, _NotAsWritten."""
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | ONLY_A_FILE)) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _NotAsWritten("not a regular file")
            if reason := distrusted(found):
                raise _NotAsWritten(reason)
            if found.st_size != self._file_bytes:
                raise _NotAsWritten(f"{found.st_size} bytes, expected {self._file_bytes}")
            content = stream.read(self._file_bytes)
            with suppress(OSError):  # the time of a file of root cannot be set
                os.utime(stream.fileno())
        return content

    def _state(self, key: bytes, content: bytes) -> DecoderState:
        """Return the state in a file, as views of its bytes. Raises _NotAsWritten."""
        values = memoryview(content)[self._file_bytes - self._values_bytes :]
        if content[: -self._values_bytes] != self._head(key, values):
            raise _NotAsWritten("altered, or of another model")
        arrays, offset = {}, 0
        for t in self._layout:
            arrays[t.name] = np.frombuffer(values, t.dtype, t.n_bytes // np.dtype(t.dtype).itemsize, offset).reshape(t.shape)
            offset += t.n_bytes
        if not (np.isfinite(arrays["conv"]).all() and np.isfinite(arrays["ssm"]).all()):
            raise _NotAsWritten("contains NaN or infinity")
        n_tokens = int(arrays["n_tokens"][0])
        if not 0 <= n_tokens <= self._most_tokens:
            raise _NotAsWritten(f"n_tokens is {n_tokens}, expected at most {self._most_tokens}")
        return DecoderState(arrays["conv"], arrays["ssm"], n_tokens)

    def _is_taken(self, file: Path) -> bool:
        """Whether a file exists and need not be written; its time of use is updated."""
        try:
            found = file.lstat()
        except FileNotFoundError:
            return False
        if stat.S_ISREG(found.st_mode):
            if found.st_size != self._file_bytes:
                return False
            with suppress(OSError):
                os.utime(file, follow_symlinks=False)
        return True

    def _write(self, file: Path, key: bytes, state: DecoderState) -> None:
        """Write a temporary file and rename it. Raises OSError."""
        values = [np.ascontiguousarray(value).data.cast("B") for value in state.parts().values()]
        descriptor, name = tempfile.mkstemp(".part", f"{key.hex()}.", self._own)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(self._head(key, *values))
                stream.writelines(values)
            os.replace(name, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise

    def _make_room(self) -> None:
        """Remove the least recently used files until one more fits. Raises OSError where that is not enough."""
        found = sorted(self._all_files(), key=lambda one: one.used_seconds)
        spare = self._limit_bytes - self._file_bytes - sum(one.size_bytes for one in found)
        now = time.time()
        for one in found:
            half_written = _TEMPORARY.fullmatch(one.path.name) is not None
            given_up = now - one.used_seconds > _ABANDONED_SECONDS if half_written else spare < 0
            if given_up and _remove(one.path):
                spare += one.size_bytes
        if spare < 0:
            raise OSError(f"{-spare} bytes above the limit of {self._limit_bytes}, and no further file can be removed")

    def _all_files(self) -> Iterator[_Found]:
        """Yield the files of all bundles, temporary ones included."""
        for folder in _entries(self._directory):
            if not _FINGERPRINT.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(Path(folder.path)):
                if (_WHOLE.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield _Found(found.st_mtime, found.st_size, Path(entry.path))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a directory; none where it is gone or unreadable."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _remove(file: Path) -> bool:
    """Remove a regular file; returns whether it is gone."""
    try:
        if stat.S_ISREG(file.lstat().st_mode):
            file.unlink()
            return True
        return False
    except FileNotFoundError:
        return True
    except OSError:
        return False
