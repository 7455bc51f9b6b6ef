"""Number of compute threads, and how long they spin: one setting for the decoder, torch, onnxruntime and child processes.

Spinning threads take cores away from the threads they wait for: on a busy machine an export whose libraries each used all
cores, and spun at their barriers, took thirty times as long. So a process uses one thread per available core, the same number
in all libraries, and waiting threads soon sleep.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_CGROUP = Path("/sys/fs/cgroup")
_REQUESTED = "OMP_NUM_THREADS"  # read by numeric libraries, and by us
# How long OpenMP threads, which torch uses, spin before they sleep. Defaults: GNU some milliseconds, Intel 200. Here about as
# long as the native decoder's threads (runtimes/cpu/team.cpp). Read when torch is first imported.
_SPINNING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


def physical_cores() -> int:
    """Return the number of physical cores this process may use, within affinity and a container's CPU quota."""
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
    """Return the CPU quota of the control group (version 2 or 1) in CPUs, or None for no limit."""
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
    """Return the default number of threads: one per physical core, or fewer if OMP_NUM_THREADS is lower."""
    first, cores = os.environ.get(_REQUESTED, "").partition(",")[0].strip(), physical_cores()
    return min(int(first) or cores, cores) if first.isascii() and first.isdecimal() else cores


def use_threads(threads: int | None) -> None:
    """Set the number of compute threads of this process and its children; None for `default_threads`.

    Call it before torch is imported: afterwards only the number of torch's threads can be set, not how long they spin.
    """
    count = threads or default_threads()
    os.environ[_REQUESTED] = str(count)
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SPINNING.items():
            os.environ.setdefault(name, value)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(count)
