"""The documentation site: it builds without warnings, has every page, and loads nothing from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from cobra_edge.cli import COMMANDS

from .doc_blocks import ROOT

LOADS = {"src", "srcset", "poster", "data", "action", "formaction"}
PASSIVE = {"canonical", "next", "prev"}  # relations of a <link> that a browser does not follow by itself


class References(HTMLParser):
    """What a page loads (an image, a script, a style sheet), what it links to, and its classes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.parts: set[str] = set()
        self.feed(text)
        self.loads += [url for style in re.findall(r"<style.*?</style>", text, re.DOTALL) for url in loads_of_style(style)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.loads += [given[name] for name in sorted(LOADS & given.keys())]
        if tag == "link" and given.get("rel") not in PASSIVE:
            self.loads.append(given.get("href", ""))
        elif tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.parts |= {*given.get("class", "").split(), given.get("data-md-component", "")}


def loads_of_style(text: str) -> list[str]:
    return [one or other for one, other in re.findall(r"url\(\s*['\"]?([^)'\"]+)|@import\s+['\"]([^'\"]+)", text)]


def of_another_host(url: str) -> bool:
    return bool(re.match(r"\s*(https?:|wss?:|//)", url))


def entries(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for below in nav.values() if isinstance(nav, dict) else nav:
            yield from entries(below)


def nav() -> list[str]:
    return list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_click"):
        pytest.importorskip(name, reason=f"no {name}; pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


def html(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_page_is_in_the_navigation_once() -> None:
    listed = nav()
    assert len(listed) == len(set(listed))
    assert {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} <= set(listed)


def test_every_entry_of_the_navigation_is_built(site: Path) -> None:
    assert {str(page.relative_to(site)) for page in html(site)} >= {name.replace(".md", ".html") for name in nav()}


def test_no_page_loads_from_another_host(site: Path) -> None:
    for page in html(site):
        found = References(page.read_text())
        assert found.loads, page
        assert not list(filter(of_another_host, found.loads)), page
        # elements for which the theme's script would fetch a library or figures
        assert not found.parts & {"mermaid", "source"}, page
    for style in site.rglob("*.css"):
        assert not list(filter(of_another_host, loads_of_style(style.read_text()))), style


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://host/x.js"></script>',
        '<link rel="stylesheet" href="//host/x.css">',
        '<img src="http://host/x.png">',
        "<style>body { background: url(https://host/x.png) }</style>",
        "<style>@import 'https://host/x.css'</style>",
    ],
)
def test_what_another_host_would_be_asked_for_is_seen(text: str) -> None:
    assert list(filter(of_another_host, References(text).loads))
    assert not list(filter(of_another_host, References('<a href="https://host/"><img src="x.png"></a>').loads))


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    """Links to other files of the repository too: the hook turns them into paths, or into other pages of the site."""
    seen = 0
    for page in html(site):
        if page.name == "404.html":  # is shown for any path, and so has links from the root
            continue
        for link in References(page.read_text()).links:
            parts = urlsplit(link)
            if not parts.scheme and parts.path:
                assert (page.parent / unquote(parts.path)).resolve().is_file(), f"{page}: {link}"
                assert (page.parent / unquote(parts.path)).resolve().is_relative_to(site.resolve())
                seen += 1
    assert seen > 1000


def test_every_command_has_usage_options_and_an_example(site: Path) -> None:
    text = (site / "commands.html").read_text()
    for name in COMMANDS:
        (section,) = re.findall(rf'<h3 id="cobra-edge-{name}".*?(?=<h[23] |</article>)', text, re.DOTALL)
        for part in ("Usage:", "Options:", "Example:"):
            assert part in section, (name, part)
    assert 'id="cobra-edge-regress-compare"' in text


def test_the_python_api_has_its_docstrings(site: Path) -> None:
    text = (site / "python-api.html").read_text()
    for name in ("load", "Session", "Session.ask", "Answer", "Sampling", "DecoderOptions", "Bundle", "errors.MachineError"):
        assert f'id="cobra_edge.{name}"' in text, name
    assert "Ask a question about an image" in text


def test_lists_of_several_paragraphs_stay_lists(site: Path) -> None:
    for page in html(site):
        article = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"^(\* |\d\. |<p>(\* |\| ))\S", article, re.MULTILINE), page
