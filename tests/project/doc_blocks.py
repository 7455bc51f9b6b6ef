"""Code blocks of the documentation, and which of them can be run.

A fenced block without a language is shell; others have a language (```python, ```yaml, ```text). A comment on its own line
before a block is a directive for the tests:

    <!-- not run: REASON -->                  none of it is run
    <!-- not run where "TEXT": REASON -->     its lines that contain TEXT are not run
    <!-- file: NAME -->                       the content of a file that later blocks of the page use

Blocks that are not run are still checked against the command line: every command and every option must exist.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"<!-- (?:not run(?: where \"(?P<text>[^\"]+)\")?: (?P<reason>.+?)|file: (?P<file>\S+)) -->")
_OURS = re.compile(r"cobra-edge(:\w+)?\s|python3? -m cobra_edge[.\s]")
_NOT_A_COMMAND = "cobra-edge engine without weights 1"  # the first line of a file
_INLINE = re.compile(r"`((?:cobra-edge|python -m cobra_edge)[ .][^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of its page from the root.
        line: number of its first line.
        language: of its fence; "" is shell.
        text: its content.
        reasons: why lines are not run, by a text that they contain; "" matches all of them.
        file: name of the file whose content it is.
    """

    page: str
    line: int
    language: str
    text: str
    reasons: dict[str, str] = field(default_factory=dict)
    file: str | None = None

    def why_not(self, command: str = "") -> str | None:
        """Return why a command of this block, or the whole block, is not run; None if it is."""
        return next((reason for text, reason in self.reasons.items() if text in command), None)

    def commands(self) -> list[str]:
        """Return the commands of a shell block, continued lines joined, without comments."""
        if self.language not in ("", "sh", "bash", "console"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):  # the other lines are what was answered
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*", "", line).strip())]


def pages() -> list[str]:
    """Return every page of the documentation, except the changelog."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += sorted((ROOT / "export").rglob("*.md")) + sorted((ROOT / "cobra_edge").rglob("*.md"))
    return [str(page.relative_to(ROOT)) for page in found]


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, in order. Raises ValueError for a directive without a block."""
    found, marks, opened = [], [], None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        stripped = line.strip()
        if opened is not None:
            if stripped == "```":
                found.append(_block(page, *opened, marks))
                marks, opened = [], None
            else:
                opened[2].append(line[opened[3] :])
        elif stripped.startswith("```"):
            opened = (number, stripped[3:].strip(), [], len(line) - len(line.lstrip()))
        elif mark := _MARK.fullmatch(stripped):
            marks.append(mark)
        elif marks:
            raise ValueError(f"{page}:{number}: a mark stands before no block")
        elif stripped.startswith(("<!-- not run", "<!-- file")):
            raise ValueError(f"{page}:{number}: not a mark that is known: {stripped}")
    if opened or marks:
        raise ValueError(f"{page}: a block or a mark at its end")
    return found


def _block(page: str, line: int, language: str, lines: list[str], _: int, marks: list[re.Match[str]]) -> Block:
    reasons = {mark["text"] or "": mark["reason"] for mark in marks if mark["reason"]}
    file = next((mark["file"] for mark in marks if mark["file"]), None)
    return Block(page, line, language, "\n".join(lines) + "\n", reasons, file)


def inline_commands(page: str) -> list[str]:
    """Return our commands in running text; optional parts are kept, without their brackets."""
    text, inside = [], False
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        inside ^= line.strip().startswith("```")
        if not inside and not line.strip().startswith("```"):
            text.append(line)
    found = _INLINE.findall(" ".join(text))
    return [re.sub(r"[\[\]…]", "", command) for command in found if "COMMAND" not in command and command != _NOT_A_COMMAND]


def our_arguments(command: str) -> list[list[str]]:
    """Return the arguments of each call of `cobra-edge` in a shell command, in any form."""
    calls = []
    for part in re.split(r"\|\||&&|[|;]", command) if _OURS.search(command + " ") else ():
        words = shlex.split(part)
        for index, word in enumerate(words):
            # In a container its name is that of the image, with a tag.
            if (word == "cobra-edge" or word.startswith("cobra-edge:")) and words[index - 1] != "-t":
                calls.append(words[index + 1 :])
                break
            if word == "-m" and words[index + 1].startswith("cobra_edge"):
                calls.append([*words[index + 1].split(".")[1:], *words[index + 2 :]])
                break
    return calls
