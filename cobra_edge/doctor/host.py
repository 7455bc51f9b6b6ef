"""Checks of the host: processor, memory, and the cache directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs

from ..bench.roofline import Memory
from ..decode.native.library import kernel_names, why_not
from ..environment.available_memory import available_bytes, total_bytes
from ..environment.cpu_name import cpu_name
from ..environment.threads import default_threads, physical_cores
from .check import Check, Verdict

_PLAIN = "scalar"  # the kernels in plain C++
_MEASURED_PART = 8  # of the available memory at most this part is read
_READS = 5
_LITTLE_DISK_BYTES = 1 << 30  # an engine at full size is larger


class ProcessorCheck(Check, frozen=True, kw_only=True):
    """The CPU and the native decoder's kernels for it.

    Attributes:
        name: of the CPU.
        cores: physical cores that this process may use.
        threads: that it uses by default.
        kernels: instruction sets that can be used, the default first; empty without the native library.
    """

    name: str
    cores: int
    threads: int
    kernels: tuple[str, ...]


def check_processor() -> ProcessorCheck:
    """Check which kernels of the native decoder this CPU runs."""
    name, cores, threads, reason = cpu_name(), physical_cores(), default_threads(), why_not()
    kernels = () if reason else tuple(kernel_names())
    verdict: Verdict = "ok"
    told = f"{name}, {threads} of {cores} cores used by default"
    if reason is not None:
        verdict, told = "missing", f"{told}; no native decoder, the numpy one takes many times as long: {reason}"
    elif kernels[0] == _PLAIN:
        verdict, told = "warning", f"{told}; no kernels for its instructions, plain C++ is used"
    else:
        told = f"{told}; kernels {', '.join(kernels)}"
    return ProcessorCheck(verdict=verdict, text=told, name=name, cores=cores, threads=threads, kernels=kernels)


class MemoryCheck(Check, frozen=True, kw_only=True):
    """Memory.

    Attributes:
        total_bytes, available_bytes: within the limits of a control group.
        read_bytes_per_s: the bandwidth, measured with the default number of threads; None without the native library.
    """

    total_bytes: int | None
    available_bytes: int | None
    read_bytes_per_s: float | None


def check_memory() -> MemoryCheck:
    """Check how much memory is available, and measure its bandwidth, which takes about a second."""
    total, available = total_bytes(), available_bytes()
    told = [] if total is None or available is None else [f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"]
    speed = None
    if why_not() is None:
        memory = Memory(default_threads(), None if available is None else available // _MEASURED_PART)
        speed = max(memory.read_bandwidth() for _ in range(_READS))
        told.append(f"{speed / 1e9:.1f} GB/s of read bandwidth")
    text = ", ".join(told) or "the system does not report it"
    return MemoryCheck(text=text, total_bytes=total, available_bytes=available, read_bytes_per_s=speed)


class CacheCheck(Check, frozen=True, kw_only=True):
    """The user's cache: engines, hashes of bundles, images for calibration.

    Attributes:
        directory: where it lies, whether it exists or not.
        bytes: what it takes.
        free_bytes: left on its disk.
    """

    directory: str
    bytes: int
    free_bytes: int


def check_cache() -> CacheCheck:
    """Check whether the cache can be written, and what it takes."""
    directory = platformdirs.user_cache_path("cobra_edge")
    there = next(p for p in (directory, *directory.parents) if p.exists())
    size, free = _size(directory), shutil.disk_usage(there).free
    verdict: Verdict = "ok"
    text = f"{directory}: {size / 1e6:,.1f} MB, {free / 1e9:,.1f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        verdict = "warning"
        text = (
            f"{directory} cannot be written: engines are not kept, and a bundle's files are hashed each time; fix its "
            "permissions, or set XDG_CACHE_HOME to another directory"
        )
    elif free < _LITTLE_DISK_BYTES:
        verdict, text = "warning", f"{text}: too little for an engine at full size; free some space"
    return CacheCheck(verdict=verdict, text=text, directory=str(directory), bytes=size, free_bytes=free)


def _size(directory: Path) -> int:
    """Return the bytes of all files below a directory, those that cannot be read or were just removed left out."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total
