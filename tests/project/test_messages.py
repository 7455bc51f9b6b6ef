"""Tables of messages in the documentation quote what the program says, with … for what varies."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from .doc_blocks import ROOT, pages

HEADER = "| message | what to do |"


@cache
def said() -> list[str]:
    """Return every string of the package, what is put into it as a NUL; docstrings too, which no table quotes."""
    found = []
    for file in sorted((ROOT / "cobra_edge").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def pattern(message: str) -> re.Pattern[str]:
    """Return what finds a quoted message: its text as it is, and at each … something, whatever is put in on the way."""
    return re.compile(".*?".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)


def quoted() -> list[tuple[str, str]]:
    rows = []
    for page in pages():
        lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
        for line in lines:
            if line == HEADER:
                assert next(lines).startswith("|---")
                for row in lines:
                    if not row.startswith("|"):
                        break
                    rows.append((page, row.split(" | ")[0].removeprefix("| ").removesuffix(" (a benchmark)")))
    return rows


@pytest.mark.parametrize(("page", "message"), quoted())
def test_a_message_is_one_that_exists(page: str, message: str) -> None:
    assert len(re.sub("[^a-z]", "", message)) > 10, "too little to recognize"
    assert any(pattern(message).search(text) for text in said()), f"{page}: nothing says {message!r}"


def test_a_message_that_does_not_exist_is_found() -> None:
    assert quoted()
    assert not any(pattern("the GPU … is on fire").search(text) for text in said())
