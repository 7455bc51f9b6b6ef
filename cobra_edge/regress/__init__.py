"""How far a quantized build is from the float model: suites, measures, budgets, reports."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # The verb needs rooms that themselves need this one; it is looked up when it is called for.
    if name == "command":
        from .verbs import command

        return command
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
