"""What a release takes from the tree: `python .github/release.py check-tag v0.1.0`, `python .github/release.py notes`.

The standard library alone: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
_BAD_INPUT = 2  # as in cobra_edge/errors.py
_RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|#)")


def _refuse(message: str) -> NoReturn:
    print(f"release: {message}", file=sys.stderr)
    sys.exit(_BAD_INPUT)


def version(root: Path = ROOT) -> str:
    """Return the version of the tree, from cobra_edge/version.py."""
    text = (root / "cobra_edge" / "version.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    return str(found)


def section(changelog: str, wanted: str) -> tuple[str, str]:
    """Return the date in the heading `## VERSION, DATE` of CHANGELOG.md, and the text below it up to the next `## `.

    Exits with code 2 if the version has no such section, or an empty one.
    """
    parts = re.split(r"^## (.+)\n", changelog, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        name, _, date = heading.partition(",")
        if name.strip() == wanted:
            if not body.strip():
                _refuse(f"CHANGELOG.md: got nothing below '## {heading}', expected what the release changes")
            return date.strip(), f"{body.strip()}\n"
    have = ", ".join(heading.partition(",")[0] for heading in parts[1::2])
    _refuse(f"CHANGELOG.md: got the sections {have}, expected one of {wanted}; add '## {wanted}, YYYY-MM-DD'")


def check_tag(tag: str, root: Path = ROOT) -> None:
    """Exit with code 2 unless a tag is `v` and the tree's version, whose section of CHANGELOG.md has a date."""
    expected = f"v{version(root)}"
    if tag != expected:
        _refuse(
            f"tag: got {tag!r}, expected {expected!r}, the version in cobra_edge/version.py; "
            "correct the version, commit, and tag that commit"
        )
    date, _ = section((root / "CHANGELOG.md").read_text(encoding="utf-8"), version(root))
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date):
        _refuse(f"CHANGELOG.md: got '## {version(root)}, {date}', expected the day of the release as YYYY-MM-DD")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(
        description="What a release takes from the tree.", epilog="Example: python .github/release.py check-tag v0.1.0"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check-tag", help="Refuse a tag that is not the tree's version, or has no dated changes.")
    check.add_argument("tag", help="Such as v0.1.0.")
    notes = commands.add_parser("notes", help="Print a version's section of CHANGELOG.md.")
    notes.add_argument("--version", default="", help="Default: the tree's.")
    notes.add_argument("--links", default="", help="URL before relative links, which lead nowhere outside the tree.")
    arguments = parser.parse_args()
    if arguments.command == "check-tag":
        check_tag(arguments.tag)
        print(f"{arguments.tag} is the version of this tree")
        return
    _, text = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), arguments.version or version())
    if arguments.links:
        text = _RELATIVE_LINK.sub(f"]({arguments.links.rstrip('/')}/", text)
    print(text, end="")


if __name__ == "__main__":
    main()
