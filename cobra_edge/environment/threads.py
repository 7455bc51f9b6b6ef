"""How many threads a process computes with, and how long they spin: one number for the decoder, torch, onnxruntime, children.

Threads that wait for each other take the cores away from what they wait for: on a busy machine an export whose libraries each
took all cores, and spun at their barriers, took thirty times its time. So a process takes one thread a core that it may use,
all its libraries the same number, and whoever waits soon sleeps.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP = Path("/sys/fs/cgroup")
_ASKED = "OMP_NUM_THREADS"  # by which numeric libraries are told, ours too
# How long OpenMP's threads, which are torch's, spin before they sleep: by default GNU's some milliseconds, Intel's 200. Here
# about as long as the decoder's own (runtimes/cpu/team.cpp). Read when torch is first imported.
_SPINNING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


def physical_cores() -> int:
    """Return how many cores this process may use: siblings of one core count once, a container's quota is kept."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        try:
            cores.add(Path(_SIBLINGS.format(cpu)).read_text())
        except OSError:
            cores.add(str(cpu))
    quota = _quota()
    return max(1, len(cores) if quota is None else min(len(cores), math.ceil(quota)))


def _quota() -> float | None:
    """Return how many processors' time the control group has, of version 2 or 1, or None for no limit."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((_CGROUP / "cpu" / f"cpu.cfs_{of}_us").read_text() for of in ("quota", "period"))
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None


def default_threads() -> int:
    """Return how many threads to take where nobody says: one a physical core, or fewer where OMP_NUM_THREADS says so."""
    first, cores = os.environ.get(_ASKED, "").partition(",")[0].strip(), physical_cores()
    return min(int(first) or cores, cores) if first.isascii() and first.isdecimal() else cores


def use_threads(threads: int | None) -> None:
    """Have this process and its children compute with so many threads; None for `default_threads`.

    Before torch is imported, or its threads will spin as long as OpenMP's default is; their number is set in any case.
    """
    count = threads or default_threads()
    os.environ[_ASKED] = str(count)
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SPINNING.items():
            os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
