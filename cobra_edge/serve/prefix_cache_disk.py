"""States on disk, so that an image that was looked at once is never looked at again, not even after a restart.

One safetensors file a state, `directory/fingerprint/key.safetensors`; the fingerprint names the bundle and what runs it. The
header's metadata says key, fingerprint and the sha256 of the values, and a file is taken only when it is, byte for byte, what
would be written for those values: a flipped bit, a cut end or another model's state is refused and removed. That is also why a
write does not wait for the disk: what a power cut leaves of it is refused later. Files are renamed into place when they are
whole, so several servers of one user may share a directory; each may then exceed the limit by one file for a moment. Nothing is
followed or removed that could not be ours, and nothing is believed that another user could have written: directories and files
belong to this user (or root), and nobody else may write to them.
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
_WHOLE, _PART = re.compile(r"[0-9a-f]{64}\.safetensors"), re.compile(r"[0-9a-f]{64}\.[a-z0-9_]{8}\.part")
_ABANDONED_SECONDS = 60.0  # no write of one state takes that long


class _NotAsWritten(Exception):
    """A file that is not what was once written; the text says what it is."""


@dataclass(frozen=True)
class _Found:
    """A file of ours in the directory, whichever bundle's."""

    used_seconds: float
    size_bytes: int
    path: Path


class PrefixCacheDisk:
    """The states of one bundle in a directory that others may use too, the least recently used of all given up first.

    Attributes:
        refused: files that were not as they were written, or could not be read.
    """

    def __init__(
        self, directory: Path, limit_bytes: int, config: MambaConfig, fingerprint: str, most_tokens: int = 1 << 20
    ) -> None:
        """Make the directory where there is none.

        Args:
            directory: of all bundles' states.
            limit_bytes: for all files in it.
            config: sizes of the states.
            fingerprint: hex digits that differ wherever states may.
            most_tokens: that the model reads; a state of more is none of its own.

        Raises:
            InputError: nothing can be written there, others may write there, or the limit is less than one state.
        """
        assert _FINGERPRINT.fullmatch(fingerprint)
        self._directory, self._own, self._fingerprint = directory, directory / fingerprint, fingerprint
        self._most_tokens = most_tokens
        self._limit_bytes, self._layout = limit_bytes, DecoderState.layout(config)
        self._values_bytes = sum(t.n_bytes for t in self._layout)
        self._file_bytes = len(self._head(bytes(32), b"")) + self._values_bytes
        self.refused, self._left_alone, self._failing = 0, set[str](), False
        if limit_bytes < self._file_bytes:
            raise InputError(
                f"{directory}: {limit_bytes} bytes for states on disk, but one of this model takes {self._file_bytes}; "
                "allow more, or name no directory"
            )
        try:
            self._make_directories()
            with tempfile.TemporaryFile(dir=self._own):
                pass
        except OSError as error:
            raise InputError(
                f"{directory}: states cannot be kept there ({error}); name a directory you may write to"
            ) from error

    def load(self, key: bytes) -> DecoderState | None:
        """Return the state of a key of 32 bytes, its arrays read-only; None where there is none that is as it was written."""
        file = self._file_of(key)
        if file.name in self._left_alone:
            return None
        try:
            self._require_own_directories()
        except FileNotFoundError:
            return None
        except OSError as error:  # what lies there is another's to remove
            self.refused += 1
            self._left_alone.add(file.name)
            log.warning("%s: not looked at (%s)", file, error)
            return None
        try:
            return self._state(key, self._read(file))
        except FileNotFoundError:
            return None
        except (OSError, _NotAsWritten) as error:
            self.refused += 1
            removed = _remove(file)
            log.warning("%s: %s; %s", file, error, "removed" if removed else "left where it is, and not looked at again")
            if not removed:
                self._left_alone.add(file.name)
            return None

    def save(self, key: bytes, state: DecoderState) -> None:
        """Write the state of a key of 32 bytes, unless it is there; where that fails, a warning says so and it is not kept."""
        file = self._file_of(key)
        try:
            self._make_directories()
            if not self._is_taken(file):
                self._make_room()
                self._write(file, key, state)
                self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s: a state could not be kept (%s); the next ones are tried without a word", file, error)
            self._failing = True

    def _file_of(self, key: bytes) -> Path:
        assert len(key) == 32
        return self._own / f"{key.hex()}.safetensors"

    def _make_directories(self) -> None:
        """Make both directories, now or again. Raises OSError: something else is there."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own.mkdir(mode=0o700, exist_ok=True)
        self._require_own_directories()

    def _require_own_directories(self) -> None:
        """Raise OSError where a directory is a link (the first may be one), another user's, or open for others to write."""
        if self._own.is_symlink():
            raise NotADirectoryError(f"{self._own} is a link; remove it")
        for directory in (self._directory, self._own):
            if reason := distrusted(directory.stat()):
                raise PermissionError(f"{directory}: {reason}")

    def _head(self, key: bytes, *values: bytes | memoryview) -> bytes:
        """Return what the file of some values begins with; its length is the same for all."""
        digest = hashlib.sha256()
        for part in values:
            digest.update(part)
        return safetensors_header(
            self._layout, {"key": key.hex(), "fingerprint": self._fingerprint, "values_sha256": digest.hexdigest()}
        )

    def _read(self, file: Path) -> bytes:
        """Return a file of the right size. Raises OSError, _NotAsWritten."""
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | ONLY_A_FILE)) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise _NotAsWritten("not a regular file")
            if reason := distrusted(found):
                raise _NotAsWritten(reason)
            if found.st_size != self._file_bytes:
                raise _NotAsWritten(f"{found.st_size} bytes, expected {self._file_bytes}")
            content = stream.read(self._file_bytes)
            with suppress(OSError):  # root's file is used, but its time is not ours to set
                os.utime(stream.fileno())
        return content

    def _state(self, key: bytes, content: bytes) -> DecoderState:
        """Return the state a file holds, over its bytes. Raises _NotAsWritten."""
        values = memoryview(content)[self._file_bytes - self._values_bytes :]
        if content[: -self._values_bytes] != self._head(key, values):
            raise _NotAsWritten("altered, or of another model")
        arrays, offset = {}, 0
        for t in self._layout:
            arrays[t.name] = np.frombuffer(values, t.dtype, t.n_bytes // np.dtype(t.dtype).itemsize, offset).reshape(t.shape)
            offset += t.n_bytes
        if not (np.isfinite(arrays["conv"]).all() and np.isfinite(arrays["ssm"]).all()):
            raise _NotAsWritten("holds NaN or infinity")
        n_tokens = int(arrays["n_tokens"][0])
        if not 0 <= n_tokens <= self._most_tokens:
            raise _NotAsWritten(f"says that it has read {n_tokens} tokens, expected at most {self._most_tokens}")
        return DecoderState(arrays["conv"], arrays["ssm"], n_tokens)

    def _is_taken(self, file: Path) -> bool:
        """Say whether a name needs no writing: the state is there (and used now), or something that is not ours."""
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
        """Write a file beside its name and rename it. Raises OSError."""
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
        """Remove the least recently used files until one more fits. Raises OSError when that is not enough."""
        found = sorted(self._all_files(), key=lambda one: one.used_seconds)
        spare = self._limit_bytes - self._file_bytes - sum(one.size_bytes for one in found)
        now = time.time()
        for one in found:
            half_written = _PART.fullmatch(one.path.name) is not None
            given_up = now - one.used_seconds > _ABANDONED_SECONDS if half_written else spare < 0
            if given_up and _remove(one.path):
                spare += one.size_bytes
        if spare < 0:
            raise OSError(f"{-spare} bytes above the limit of {self._limit_bytes}, and nothing more that may be removed")

    def _all_files(self) -> Iterator[_Found]:
        """Yield the files of all bundles, half-written ones too."""
        for folder in _entries(self._directory):
            if not _FINGERPRINT.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(Path(folder.path)):
                if (_WHOLE.fullmatch(entry.name) or _PART.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield _Found(found.st_mtime, found.st_size, Path(entry.path))


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    """Return what a directory holds; nothing where it has gone or is not ours to read."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _remove(file: Path) -> bool:
    """Remove a regular file, and say whether there is none any more."""
    try:
        if stat.S_ISREG(file.lstat().st_mode):
            file.unlink()
            return True
        return False
    except FileNotFoundError:
        return True
    except OSError:
        return False
