"""The machine that a result was measured on, and time and memory of a child process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from ..environment.cpu_name import cpu_name
from ..environment.source_commit import source_commit


class Machine(msgspec.Struct, frozen=True):
    """Processor, logical cores, memory in GB (10⁹ bytes), Python, library versions by name, and the commit of the source."""

    processor: str
    cores: int
    memory_gb: float
    python: str
    libraries: dict[str, str]
    commit: str


def machine() -> Machine:
    """Describe this machine."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    libraries = {name: version_of(name) for name in ("torch", "timm", "onnx", "onnxruntime", "numpy")}
    memory_gb = round(memory_bytes / 1e9, 1)
    return Machine(
        cpu_name(), os.cpu_count() or 0, memory_gb, platform.python_version(), libraries, source_commit() or "unknown"
    )


def version_of(name: str) -> str:
    """Return a library's version, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Finished:
    """A child process that has ended.

    Attributes:
        exit_code, stdout, seconds: its exit code, stdout and wall time.
        peak_bytes: peak resident memory, mapped files included, which the kernel takes back where memory is short.
        own_peak_bytes: peak of what no file backs.
    """

    exit_code: int
    stdout: str
    seconds: float
    peak_bytes: int
    own_peak_bytes: int


def measure(
    arguments: list[str], environment: dict[str, str] | None = None, kill: Callable[[], bool] = lambda: False
) -> Finished:
    """Run `python -m ARGUMENTS` as a child process with additional environment variables; stderr is inherited.

    The process is killed as soon as `kill` returns true.

    The peak resident set is the kernel's high-water mark, read while the child runs. The figure reported at its exit would be
    wrong: a child inherits the mark of its parent.
    """
    began = time.perf_counter()
    variables = os.environ | (environment or {})
    child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, env=variables)
    peak = own = 0
    while True:
        found = _memory(child.pid)
        peak, own = max(peak, found.get("VmHWM", 0)), max(own, found.get("RssAnon", 0))
        if kill():
            child.kill()
        try:
            stdout, _ = child.communicate(timeout=_POLL_SECONDS)
            return Finished(child.returncode, stdout, time.perf_counter() - began, peak, own)
        except subprocess.TimeoutExpired:
            continue


def high_water_mark(pid: int) -> int:
    """Return the peak resident set of a running process in bytes; 0 if it has ended."""
    return _memory(pid).get("VmHWM", 0)


def _memory(pid: int) -> dict[str, int]:
    """Return what the kernel counts of a running process's memory in bytes, by its name there; nothing if it has ended."""
    try:
        rows = (row.split() for row in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
    except (OSError, ValueError):
        return {}
