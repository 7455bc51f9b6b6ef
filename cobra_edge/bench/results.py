"""Results on disk: bench/results/NAME.json under the current directory."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError

RESULTS = Path("bench") / "results"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


def check_name(name: str) -> None:
    """Raise InputError for a name that could not be a result's."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name for a result; expected letters, digits, '.', '_', '+' and '-'")


def save_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result as bench/results/NAME.json, whole or not at all; returns the file."""
    check_name(name)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory(dir=RESULTS, prefix=f".{name}.partial-") as stage:
        staged = Path(stage) / file.name
        staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(staged, file)
    return file
