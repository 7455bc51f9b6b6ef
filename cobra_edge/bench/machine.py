"""What a result was measured on, and what a child process took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..environment.cpu_name import cpu_name


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, Python and library versions, and the commit."""
    libraries = {name: version_of(name) for name in ("torch", "timm", "onnx", "onnxruntime", "numpy")}
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "libraries": libraries,
        "commit": _commit(),
    }


def version_of(name: str) -> str:
    """Return a library's version, or that it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of the source tree, with a mark where files differ from it, or "unknown"."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Finished:
    """A child process that ended."""

    exit_code: int
    stdout: str
    seconds: float
    peak_bytes: int


def measure(arguments: list[str], environment: dict[str, str] | None = None) -> Finished:
    """Run `python -m …` as a child, with these variables added to the environment; its stderr goes through.

    The peak is its largest resident set, mapped files included: the kernel's high-water mark, read while the child runs. The
    figure that comes with its exit would not do: a child begins with its parent's mark.
    """
    began = time.perf_counter()
    variables = os.environ | (environment or {})
    child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, env=variables)
    peak = 0
    while True:
        peak = max(peak, high_water_mark(child.pid))
        try:
            stdout, _ = child.communicate(timeout=_POLL_SECONDS)
            return Finished(child.returncode, stdout, time.perf_counter() - began, peak)
        except subprocess.TimeoutExpired:
            continue


def high_water_mark(pid: int) -> int:
    """Return the largest resident set of a running process so far, in bytes; 0 when it has gone."""
    try:
        for row in Path(f"/proc/{pid}/status").read_text().splitlines():
            if row.startswith("VmHWM:"):
                return int(row.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
