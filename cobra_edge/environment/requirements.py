"""Optional dependencies: whether they are installed, and the command that installs their extra."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import msgspec

from ..errors import MachineError

_CHECKOUT = Path(__file__).resolve().parents[2]


class _Vcs(msgspec.Struct):
    vcs: str


class _Origin(msgspec.Struct):
    """direct_url.json (PEP 610), which pip writes for packages that are not from an index."""

    url: str
    vcs_info: _Vcs | None = None


def install_hint(*extras: str) -> str:
    """Return the command that installs extras of this package, from its checkout or from the source it was installed from."""
    named = f"[{','.join(extras)}]"
    if (_CHECKOUT / "pyproject.toml").is_file():
        try:
            where = "." if Path.cwd() == _CHECKOUT else str(_CHECKOUT)
        except OSError:  # the current directory was removed
            where = str(_CHECKOUT)
        return f"pip install '{where}{named}'"
    return f"pip install 'cobra-edge{named}{_source()}'"


def _source() -> str:
    """Return " @ URL" if the package was installed from a directory, a file or a repository; "" for an index."""
    from importlib import metadata  # takes a MiB, and is needed for messages alone

    try:
        text = metadata.distribution("cobra-edge").read_text("direct_url.json")
        origin = msgspec.json.decode(text or "", type=_Origin)
    except (metadata.PackageNotFoundError, msgspec.MsgspecError):
        return ""
    return f" @ {origin.url}" if origin.vcs_info is None else f" @ {origin.vcs_info.vcs}+{origin.url}"


def require_export(purpose: str, *modules: str) -> None:
    """Raise MachineError if a module of the extra "export" is not installed; none is imported, some take seconds.

    Args:
        purpose: what needs them, for the message.
        modules: their names.
    """
    for module in modules:
        if sys.modules.get(module) is None and (module in sys.modules or importlib.util.find_spec(module) is None):
            raise MachineError(f"{purpose} needs {module}; install it with: {install_hint('export')}")
