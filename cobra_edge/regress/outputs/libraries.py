"""Libraries that only some outputs need, checked before any work."""

from __future__ import annotations

import importlib

from ...environment.requirements import install_hint
from ...errors import MachineError


def require(purpose: str, *modules: str) -> None:
    """Import each module.

    Raises:
        MachineError: one is not installed; the message has the command that installs it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MachineError(f"{purpose} needs {error.name}; install it with: {install_hint('regress')}") from error
