"""The commit that this installation was made from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def source_commit(package: Path = _PACKAGE) -> str | None:
    """Return the commit, marked "-dirty" where files of a checkout differ from it; None if nothing tells.

    A checkout is asked itself, not a repository that happens to be around an installation; in a wheel the commit is a file that
    CMake wrote. A copy of the tree without its repository is told by the variable COBRA_COMMIT.

    Args:
        package: the directory of the package.
    """
    checkout, recorded = package.parent, package / "data" / "commit"
    found = ""
    try:
        if (checkout / "pyproject.toml").is_file() and (checkout / ".git").exists():
            asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
            found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        elif recorded.is_file():
            found = recorded.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # no git, or no permission
        pass
    return found or os.environ.get("COBRA_COMMIT") or None
