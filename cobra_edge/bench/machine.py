"""What a result was measured on, and what a child process took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, Python and library versions, and the commit."""
    libraries = {name: version(name) for name in ("torch", "timm", "onnx", "onnxruntime", "numpy")}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "libraries": libraries,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """Return the commit of the source tree, with a mark where files differ from it, or "unknown"."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Finished:
    """A child process that ended."""

    exit_code: int
    stdout: str
    seconds: float
    peak_bytes: int


def measure(arguments: list[str]) -> Finished:
    """Run `python -m …` as a child; its stderr goes through. The peak is its largest resident set, mapped files included."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    stdout = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return Finished(child.returncode, stdout, time.perf_counter() - began, usage.ru_maxrss * 1024)
