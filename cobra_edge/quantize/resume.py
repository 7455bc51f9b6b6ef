"""Resume an interrupted calibration: finished parts in a directory.

A part holds the statistics of one layer, or of the head; the residual streams after the last finished layer are stored beside
the parts. Each file is written under another name and renamed, the streams after their part, so the directory is consistent
whenever a run stops. Without a directory everything is kept in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import BundleError, InputError
from ..formats.recipe import StoredTensor
from ..formats.safetensors_file import SafetensorsWriter, map_tensors, read_tensors

log = logging.getLogger(__name__)

_IDENTITY = "inputs.json"
_STREAMS = "streams"


def remove_resume_directory(directory: Path) -> None:
    """Remove a resume directory: streams first, identity last, so that a run can resume from whatever is left."""
    for file in sorted(directory.iterdir(), key=lambda f: (f.name == _IDENTITY, not f.name.startswith(_STREAMS))):
        file.unlink()
    directory.rmdir()


class Resume:
    """Finished parts, numbered from 0, and the streams that the next one starts from."""

    def __init__(self, directory: Path | None, identity: bytes) -> None:
        """Resume from the directory, or start.

        Args:
            directory: created if it does not exist; None keeps everything in memory.
            identity: bytes that identify model and data. Parts of another identity are removed with a warning.

        Raises:
            InputError: the directory holds files of something else.
        """
        self.directory, self._memory = directory, dict[int, dict[str, np.ndarray]]()
        if directory is None:
            return
        mark = directory / _IDENTITY
        if directory.exists() and not mark.is_file() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory}: not an interrupted calibration; remove it or give another --out")
        if mark.is_file() and mark.read_bytes() != identity:
            log.warning("%s: left by a calibration with other inputs; starting over", directory)
            remove_resume_directory(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            staged = mark.with_suffix(".new")
            staged.write_bytes(identity)
            os.replace(staged, mark)

    def finished(self) -> int:
        """Return the index of the part that the stored streams precede; 0 if nothing is finished."""
        if self.directory is None:
            return 0
        counts = [int(f.stem.rpartition("-")[2]) for f in self.directory.glob(f"{_STREAMS}-*.safetensors")]
        return max(counts, default=0)

    def read_streams(self, shape: tuple[int, int]) -> np.ndarray | None:
        """Return the streams after the last finished part, (positions, d_model) float32; None if there are none."""
        if self.directory is None:
            return None
        file = self._streams(self.finished())
        if not file.is_file():
            return None
        with self._damage_explained():
            return read_tensors(file, [StoredTensor(_STREAMS, "float32", shape)])[_STREAMS]

    def keep_streams(self, index: int, streams: np.ndarray) -> None:
        """Store the streams before part `index`, (positions, d_model) float32, and remove those before earlier parts."""
        if self.directory is None:
            return
        self._write(self._streams(index), {_STREAMS: streams})
        for file in self.directory.glob(f"{_STREAMS}-*.safetensors"):
            if file != self._streams(index):
                file.unlink()

    def keep(self, index: int, tensors: dict[str, np.ndarray]) -> None:
        """Store a part: tensors by name, with shapes and dtypes of `projection_tensors`, such as (n,) float32."""
        if self.directory is None:
            self._memory[index] = tensors
        else:
            self._write(self._part(index), tensors)

    def has(self, index: int) -> bool:
        """Tell whether a part is finished."""
        return index in self._memory if self.directory is None else self._part(index).is_file()

    def tensors(self, expected: Mapping[int, list[StoredTensor]]) -> dict[str, np.ndarray]:
        """Return the tensors of all parts by name, memory-mapped if there is a directory.

        Args:
            expected: names, dtypes and shapes, such as (n,) float32, by part.

        Raises:
            InputError: a part is damaged.
        """
        if self.directory is None:
            return {name: values for part in self._memory.values() for name, values in part.items()}
        found: dict[str, np.ndarray] = {}
        with self._damage_explained():
            for index, wanted in expected.items():
                found |= map_tensors(self._part(index), wanted)
        return found

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except BundleError as error:
            raise InputError(f"{error}; remove {self.directory} and calibrate again") from error

    def _part(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"part-{index}.safetensors"

    def _streams(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{_STREAMS}-{index}.safetensors"

    @staticmethod
    def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
        staged = file.with_suffix(".new")
        with SafetensorsWriter(staged, [StoredTensor(n, v.dtype.name, v.shape) for n, v in tensors.items()]) as writer:
            for name, values in tensors.items():
                writer.write(name, values)
        os.replace(staged, file)
