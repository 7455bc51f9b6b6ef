"""Kernels that TensorRT for RTX compiled for one engine on one kind of GPU, kept between runs."""

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
    """A file of the engine cache; losing it costs the time of compiling."""

    def __init__(self, key: EngineKey, gpu: Gpu, cache: EngineCache | None = None) -> None:
        """Take the engine's key and the GPU."""
        self._cache = cache or EngineCache()
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self.file = self._cache.directory / f"{key.stem}-{slug}.kernels"
        self._loaded = b""

    def load(self, compiled: Any) -> None:
        """Fill the library's cache with what was kept; a file that is damaged, or that the library refuses, is passed over."""
        try:
            stored = read_trusted(self.file)
        except OSError:
            return
        digest, data = stored[:_SHA256_BYTES], stored[_SHA256_BYTES:]
        if hashlib.sha256(data).digest() == digest and compiled.deserialize(data):
            self._loaded = data
        else:
            log.info("vision: %s is damaged or of another driver; kernels are compiled again", self.file)

    def save(self, compiled: Any) -> None:
        """Keep what the library's cache holds, where that is not kept yet; a file system that refuses costs only time."""
        serialised = compiled.serialize()
        data = b"" if serialised is None else bytes(serialised)
        if not data or data == self._loaded:
            return
        try:
            self._cache.replace(self.file, hashlib.sha256(data).digest() + data)
        except OSError as error:
            log.info("vision: compiled kernels were not kept (%s)", error)
