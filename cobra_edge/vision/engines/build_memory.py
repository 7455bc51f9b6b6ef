"""Memory available to an engine build on this machine."""

from __future__ import annotations

from pathlib import Path

from ...errors import MachineError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_OF_SELF = Path("/proc/self/cgroup")


def available_bytes() -> int | None:
    """Return the memory available without swapping: MemAvailable, or the control group's limit if that is lower.

    None if the system does not report it.
    """
    limits = [_machine(), *(_group(g) for g in _groups())]
    return min((limit for limit in limits if limit is not None), default=None)


def require_memory(needed_bytes: int, purpose: str) -> None:
    """Raise MachineError if less than `needed_bytes` is available; `purpose` begins the message."""
    there = available_bytes()
    if there is not None and there < needed_bytes:
        raise MachineError(
            f"{purpose} takes about {needed_bytes / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available; close other "
            "programs, raise this process's limit, or build on a larger machine"
        )


def _machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _groups() -> list[Path]:
    """Return this process's control group (version 2) and all its ancestors, each of which may set a limit."""
    try:
        lines = _CGROUP_OF_SELF.read_text().splitlines()
    except OSError:
        return [_CGROUP]
    own = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    path = _CGROUP / own
    return [p for p in (path, *path.parents) if p == _CGROUP or _CGROUP in p.parents]


def _group(group: Path) -> int | None:
    """Return the memory left in a group; reclaimable page cache counts as free."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    droppable = sum(int(s.split()[1]) for s in statistics if s.startswith(("inactive_file ", "active_file ")))
    return max(0, int(limit) - used + droppable)
