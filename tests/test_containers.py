"""The containers' recipes, as far as they can be checked without Docker."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "export" / "containers"
RECIPES = sorted(FOLDER.glob("*.Dockerfile"))
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "VOLUME", "ENTRYPOINT", "CMD"}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments), continued lines joined, comments dropped."""
    lines = [line for line in recipe.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]]


def copied(recipe: Path) -> list[str]:
    given = [rest.split() for word, rest in instructions(recipe) if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in given for source in words[:-1]]


def test_there_is_a_recipe_for_each_jetpack() -> None:
    assert [r.name for r in RECIPES] == ["jetpack6.Dockerfile", "jetpack7.Dockerfile"]
    told = (FOLDER / "README.md").read_text()
    for recipe in RECIPES:
        base = dict(instructions(recipe))["ARG"].removeprefix("BASE=")
        assert recipe.name in told and base in told


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_is_well_formed(recipe: Path) -> None:
    found = instructions(recipe)
    assert {word for word, _ in found} <= KNOWN
    assert found[0][0] == "ARG" and re.fullmatch(r"BASE=[a-z0-9./-]+:[a-z0-9.-]+", found[0][1])
    stages = [rest for word, rest in found if word == "FROM"]
    assert stages == ["${BASE} AS wheel", "${BASE}"]
    assert all(rest.count('"') % 2 == 0 and rest.count("'") % 2 == 0 for _, rest in found)
    assert ("ENV", "XDG_CACHE_HOME=/cache") in found and ("VOLUME", "/cache") in found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_what_is_copied_is_there_and_suffices_for_the_build(recipe: Path) -> None:
    sources = copied(recipe)
    assert sources and all((ROOT / s).exists() for s in sources)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    needed = [*re.findall(r"add_subdirectory\((\S+)\)", cmake), "CMakeLists.txt", "pyproject.toml", "cobra_edge"]
    needed += [d for found in re.findall(r"install\(DIRECTORY ([^)]*?) DESTINATION", cmake) for d in found.split()]
    needed += [project()["readme"], *project()["license-files"]]
    assert [n for n in needed if n not in sources and not any(n.startswith(f"{s}/") for s in sources)] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_python_and_extras_are_those_of_the_package(recipe: Path) -> None:
    text = recipe.read_text()
    (wanted,) = re.findall(r"sys\.version_info\[:2\] == \((\d+), (\d+)\)", text)
    (least,) = re.findall(r">=(\d+)\.(\d+)", project()["requires-python"])
    assert tuple(map(int, wanted)) >= tuple(map(int, least))
    (extra,) = re.findall(r"\.whl\)\[(\w+)\]", text)
    assert extra == recipe.stem and extra in project()["optional-dependencies"]
    (entry,) = [rest for word, rest in instructions(recipe) if word == "ENTRYPOINT"]
    assert Path(entry.strip('["]')).name in project()["scripts"]
