"""What of a calibration is done already: parts in a directory, so that an interrupted run goes on where it stopped.

A part is what one layer (or the head) adds to the statistics; beside the parts lie the residual streams after the last finished
layer. Each file is written under another name and renamed, the streams after the part that they come after: whatever moment
a run ends at, what lies there is whole and belongs together. Without a directory everything is kept in memory.
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


def remove_parts(directory: Path) -> None:
    """Remove a directory of parts: streams first, identity last, so that a run can go on from whatever is left."""
    for file in sorted(directory.iterdir(), key=lambda f: (f.name == _IDENTITY, not f.name.startswith(_STREAMS))):
        file.unlink()
    directory.rmdir()


class Parts:
    """Finished parts, numbered from 0, and the streams that the next one begins with."""

    def __init__(self, directory: Path | None, identity: bytes) -> None:
        """Go on with what lies in the directory, or begin.

        Args:
            directory: where, made where it is missing; None keeps everything in memory.
            identity: what the parts depend on. What lies there with another identity is removed, and a warning says so.

        Raises:
            InputError: the directory holds something that is not parts.
        """
        self.directory, self._memory = directory, dict[int, dict[str, np.ndarray]]()
        if directory is None:
            return
        mark = directory / _IDENTITY
        if directory.exists() and not mark.is_file() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory}: not a calibration that was interrupted; remove it or give another --out")
        if mark.is_file() and mark.read_bytes() != identity:
            log.warning("%s: left by a calibration with other inputs; starting anew", directory)
            remove_parts(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            staged = mark.with_suffix(".new")
            staged.write_bytes(identity)
            os.replace(staged, mark)

    def finished(self) -> int:
        """Return the number of parts before which the streams that lie there were taken; 0 where nothing is done."""
        if self.directory is None:
            return 0
        counts = [int(f.stem.rpartition("-")[2]) for f in self.directory.glob(f"{_STREAMS}-*.safetensors")]
        return max(counts, default=0)

    def read_streams(self, shape: tuple[int, int]) -> np.ndarray | None:
        """Return the streams after the last finished part, float32 of that shape; None where there are none."""
        if self.directory is None:
            return None
        file = self._streams(self.finished())
        if not file.is_file():
            return None
        with self._damage_explained():
            return read_tensors(file, [StoredTensor(_STREAMS, "float32", shape)])[_STREAMS]

    def keep_streams(self, index: int, streams: np.ndarray) -> None:
        """Keep the streams before part `index`, (positions, d_model) float32; those before earlier parts are removed."""
        if self.directory is None:
            return
        self._write(self._streams(index), {_STREAMS: streams})
        for file in self.directory.glob(f"{_STREAMS}-*.safetensors"):
            if file != self._streams(index):
                file.unlink()

    def keep(self, index: int, tensors: dict[str, np.ndarray]) -> None:
        """Keep a part."""
        if self.directory is None:
            self._memory[index] = tensors
        else:
            self._write(self._part(index), tensors)

    def has(self, index: int) -> bool:
        """Tell whether a part is finished."""
        return index in self._memory if self.directory is None else self._part(index).is_file()

    def tensors(self, expected: Mapping[int, list[StoredTensor]]) -> dict[str, np.ndarray]:
        """Return all tensors of the parts, mapped where they lie in a directory. Raises InputError where one is damaged."""
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
