"""Results on disk: bench/results/NAME.json under the current directory."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..errors import InputError

RESULTS = Path("bench") / "results"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")

AnyResult = TypeVar("AnyResult")


def check_name(name: str) -> None:
    """Raise InputError for an invalid result name."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is not a valid result name; use letters, digits, '.', '_', '+' and '-'")


def save_result(name: str, result: Any) -> Path:
    """Write a result to bench/results/NAME.json atomically.

    Args:
        name: of the file, without its suffix.
        result: a struct, or a dict.

    Returns:
        The file.
    """
    check_name(name)
    text = json.dumps(msgspec.to_builtins(result), indent=2) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory(dir=RESULTS, prefix=f".{name}.partial-") as stage:
        staged = Path(stage) / file.name
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, file)
    return file


def read_result(file: Path, kind: type[AnyResult]) -> AnyResult:
    """Read a result of this type. Raises InputError for a file that does not have its fields."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}; delete the file or run the benchmark again") from error
