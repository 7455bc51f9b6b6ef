"""Checks of a Jetson: its release, its power mode, and whether its clocks are fixed.

Source: NVIDIA, Jetson Linux Developer Guide, "Platform Power and Performance": `nvpmodel -q` names the power mode,
`jetson_clocks` sets the lowest frequency of each clock to its highest.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .check import Check

_RELEASE = Path("/etc/nv_tegra_release")
_MODEL = Path("/proc/device-tree/model")
_CLOCKS = Path("/sys/devices/system/cpu/cpufreq")
_TIMEOUT_SECONDS = 5.0
_MODE = re.compile(r"^NV Power Mode:\s*(\S+)", re.MULTILINE)
_JETPACKS = {36: "jetpack6", 38: "jetpack7"}  # by major release of Jetson Linux


class JetsonCheck(Check, frozen=True, kw_only=True):
    """A Jetson.

    Attributes:
        model: of the board.
        release: of Jetson Linux, such as "36.4.3".
        power_mode: such as "15W" or "MAXN_SUPER".
        fixed_clocks: whether the CPU's clocks are held at their highest frequency, as by jetson_clocks.
    """

    model: str | None
    release: str | None
    power_mode: str | None
    fixed_clocks: bool | None


def check_jetson() -> JetsonCheck | None:
    """Check release and power mode; None on another machine."""
    release = jetson_release()
    if release is None:
        return None
    model, mode, fixed = _text(_MODEL), _power_mode(), _fixed_clocks()
    clocks = {None: "clocks unknown", True: "clocks fixed", False: "clocks follow the load"}[fixed]
    told = f"{model or 'Jetson'}, Jetson Linux {release}; power mode {mode or 'unknown'}, {clocks}"
    slow = [
        *(["sudo nvpmodel -m 0 chooses the fastest mode"] if mode is not None and not mode.startswith("MAXN") else []),
        *(["sudo jetson_clocks fixes the clocks"] if fixed is False else []),
    ]
    return JetsonCheck(
        verdict="warning" if slow else "ok",
        text="; ".join([told, *slow]),
        model=model,
        release=release,
        power_mode=mode,
        fixed_clocks=fixed,
    )


def jetson_release() -> str | None:
    """Return the release of Jetson Linux, such as "36.4.3"; None on another machine."""
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(_RELEASE) or "")
    return None if found is None else f"{found[1]}.{found[2]}"


def jetpack() -> str | None:
    """Return the extra for this machine's JetPack, such as "jetpack6"; None on another machine or for an unknown release."""
    release = jetson_release()
    return None if release is None else _JETPACKS.get(int(release.split(".")[0]))


def _power_mode() -> str | None:
    """Return the power mode by nvpmodel; None where it does not say."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _MODE.search(done.stdout)
    return None if found is None else found[1].removeprefix("MODE_")


def _fixed_clocks() -> bool | None:
    """Return whether the lowest frequency of every CPU is its highest; None where the system does not say."""
    policies = sorted(_CLOCKS.glob("policy*"))
    lowest, highest = ([_text(p / f"scaling_{end}_freq") for p in policies] for end in ("min", "max"))
    return None if not policies or None in lowest + highest else lowest == highest


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None
