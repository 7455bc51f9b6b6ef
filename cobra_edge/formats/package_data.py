"""Location of the package's data: directories of the source tree, which a wheel contains below `cobra_edge/data/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
MINI = _PACKAGE / "mini"


def export_data(kind: str) -> Path:
    """Return this installation's directory of "targets" or "budgets" (`kind`)."""
    return _data("export") / kind


def constraints() -> Path:
    """Return the directory of the versions that were tested, a file for each Python and JetPack."""
    return _data("constraints")


def _data(name: str) -> Path:
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
