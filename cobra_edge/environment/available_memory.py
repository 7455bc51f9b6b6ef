"""Memory of this machine, within the limits of this process's control group: all of it, and what is available."""

from __future__ import annotations

from pathlib import Path

from ..errors import MachineError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_OF_SELF = Path("/proc/self/cgroup")


def available_bytes() -> int | None:
    """Return the memory available without swapping: MemAvailable, or the control group's limit if that is lower.

    None if the system does not report it.
    """
    limits = [meminfo_bytes("MemAvailable"), *(_left_in(g) for g in _groups())]
    return min((limit for limit in limits if limit is not None), default=None)


def total_bytes() -> int | None:
    """Return the machine's memory, or the control group's limit if that is lower; None if the system does not report it."""
    limits = [meminfo_bytes("MemTotal"), *(_limit_of(g) for g in _groups())]
    return min((limit for limit in limits if limit is not None), default=None)


def require_memory(needed_bytes: int, purpose: str) -> None:
    """Raise MachineError if less than `needed_bytes` is available; `purpose` begins the message."""
    there = available_bytes()
    if there is not None and there < needed_bytes:
        raise MachineError(
            f"{purpose} takes about {needed_bytes / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available; close other "
            "programs, raise this process's limit, or build on a larger machine"
        )


def meminfo_bytes(name: str) -> int | None:
    """Return an entry of /proc/meminfo, such as "MemTotal", whatever the control group; None where there is none."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _groups() -> list[Path]:
    """Return this process's control group (version 2) and all its ancestors, each of which may set a limit."""
    try:
        lines = _CGROUP_OF_SELF.read_text().splitlines()
    except OSError:
        return [_CGROUP]
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    path = _CGROUP / own
    return [p for p in (path, *path.parents) if p == _CGROUP or _CGROUP in p.parents]


def _limit_of(group: Path) -> int | None:
    """Return the limit of a group; None without one."""
    try:
        return int((group / "memory.max").read_text())
    except (OSError, ValueError):  # ValueError: "max"
        return None


def _left_in(group: Path) -> int | None:
    """Return the memory left in a group with a limit; reclaimable page cache counts as free."""
    limit = _limit_of(group)
    if limit is None:
        return None
    try:
        used = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    droppable = sum(int(s.split()[1]) for s in statistics if s.startswith(("inactive_file ", "active_file ")))
    return max(0, limit - used + droppable)
