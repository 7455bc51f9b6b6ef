"""Hooks of MkDocs: the site shows the repository's other pages too, and their links lead where they lead in the repository.

Source: https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import inspect
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from cobra_edge.cli import command

ROOT = Path(__file__).parent.parent
# Pages of the site that lie outside docs/, and where.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "containers.md": "export/containers/README.md",
    "cobra-mini.md": "cobra_edge/mini/README.md",
}
_ON_SITE = {path: page for page, path in ELSEWHERE.items()}
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^ *<!--.*?-->$", re.MULTILINE | re.DOTALL)
_ITEM = re.compile(r"([*-]|\d+\.) ")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")

_log = logging.getLogger("mkdocs.hooks")  # whose warnings fail a strict build


def on_config(config: MkDocsConfig) -> None:
    """Give commands the names they are called by, and append their examples, which mkdocs-click passes over."""
    _show_examples(command, click.Context(command))


def _show_examples(found: click.Command, context: click.Context) -> None:
    if found.epilog:
        example = found.epilog.removeprefix("Example: ")
        found.help = f"{inspect.cleandoc(found.help or '')}\n\n**Example:**\n\n```\n{example}\n```"
        found.epilog = None
    if isinstance(found, click.Group):
        for name in found.list_commands(context):
            below = found.get_command(context, name)
            assert below is not None
            below.name = name  # else that of its function
            _show_examples(below, click.Context(below, parent=context))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page's links for the site, and drop its comments: Markdown of the site would take a list after one for HTML."""
    source = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        return _on_site(link, source, files, config.extra["source"])

    parts = _FENCE.split("\n".join(_indented(markdown.splitlines())))
    parts[::2] = [_LINK.sub(rewritten, _COMMENT.sub("", part)) for part in parts[::2]]
    return "".join(parts)


def _indented(lines: list[str]) -> Iterator[str]:
    """Yield lines with what belongs to an item of a list 4 columns in, where Python-Markdown looks for it."""
    more, inside, apart = 0, False, False
    for line in lines:
        inside ^= line.startswith("```")
        if not inside and (marker := _ITEM.match(line)):
            if apart:
                yield ""  # behind an item of several paragraphs
            more, apart = 4 - len(marker[0]), False
        elif line.strip() and not line.startswith(" "):
            more = 0
        apart = apart or not line.strip()
        yield " " * more + line if line.startswith(" ") else line


def _on_site(link: re.Match[str], source: str, files: Files, repository: str | None) -> str:
    """Return a link of a page as it is on the site: to a page or file there, else to the repository, else the path alone."""
    target = link["target"]
    if re.match(r"[a-z]+:", target):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(ELSEWHERE.get(source, f"docs/{source}")), target))
    there = _ON_SITE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
    anchor = link["anchor"] or ""
    if there is not None and files.get_file_from_path(there) is not None:
        relative = posixpath.relpath(there, posixpath.dirname(source) or ".")
        return f"{link['image']}[{link['text']}]({relative}{anchor})"
    if not (ROOT / path).exists():
        _log.warning("%s links to %s, which the repository does not have", source, target)
    if repository:
        return f"[{link['text']}]({repository.rstrip('/')}/{path}{anchor})"
    return f"`{path}`" if link["text"].strip("`/") in path else f"{link['text']} (`{path}`)"
