"""Location of the package's data: `export/` of the source tree, which a wheel contains as `cobra_edge/data/export/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
MINI = _PACKAGE / "mini"


def export_data(kind: str) -> Path:
    """Return this installation's directory of "targets" or "budgets" (`kind`)."""
    installed = _PACKAGE / "data" / "export" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / "export" / kind
