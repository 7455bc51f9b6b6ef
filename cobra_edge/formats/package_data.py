"""Where the package's data lies: `export/` of the source tree, which a wheel carries as `cobra_edge/data/export/`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
MINI = _PACKAGE / "mini"


def export_data(kind: str) -> Path:
    """Return the directory of the targets or budgets (kind) that belongs to this installation."""
    installed = _PACKAGE / "data" / "export" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / "export" / kind
