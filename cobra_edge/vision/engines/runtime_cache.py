"""Cache of the kernels that TensorRT for RTX compiles for one engine on one GPU model."""

from __future__ import annotations

import hashlib
import logging
import re
from typing import Any

from ...bundle.engine_key import EngineKey
from ...files.ownership import read_trusted
from .cache import EngineCache
from .device_buffers import Gpu

log = logging.getLogger(__name__)

_SHA256_BYTES = 32


class RuntimeCache:
    """A file in the engine cache; without it kernels are recompiled."""

    def __init__(self, key: EngineKey, gpu: Gpu, cache: EngineCache | None = None) -> None:
        """Locate the file for an engine's key and a GPU."""
        self._cache = cache or EngineCache()
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self.file = self._cache.directory / f"{key.stem}-{slug}.kernels"
        self._loaded = b""

    def load(self, compiled: Any) -> None:
        """Load the file into the library's cache; a file that is damaged, or that the library rejects, is ignored."""
        try:
            stored = read_trusted(self.file)
        except OSError:
            return
        digest, data = stored[:_SHA256_BYTES], stored[_SHA256_BYTES:]
        if hashlib.sha256(data).digest() == digest and compiled.deserialize(data):
            self._loaded = data
        else:
            log.info("vision: %s is damaged or from another driver; kernels are recompiled", self.file)

    def save(self, compiled: Any) -> None:
        """Save the library's cache if it changed; a write error is logged, not raised."""
        serialized = compiled.serialize()
        data = b"" if serialized is None else bytes(serialized)
        if not data or data == self._loaded:
            return
        try:
            self._cache.replace(self.file, hashlib.sha256(data).digest() + data)
        except OSError as error:
            log.info("vision: compiled kernels were not cached (%s)", error)
