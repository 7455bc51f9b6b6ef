"""constraints/: exact versions of all installed packages, without anything specific to one machine."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "constraints"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
FILES = {
    **{f"python{version}.txt": "dev" for version in PYTHONS},
    "jetpack6.txt": "jetpack6,serve",
    "jetpack7.txt": "jetpack7,serve",
    "build.txt": "",
}


def pinned(name: str) -> dict[str, Requirement]:
    lines = (FOLDER / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def declared(extras: str, environment: dict[str, str]) -> list[Requirement]:
    """Return the direct requirements of the package and some of its extras, with nested extras expanded."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, found = [*project["dependencies"]], []
    wanted = [name for name in extras.split(",") if name]
    while wanted:
        pending += project["optional-dependencies"][wanted.pop()]
        for text in list(pending):
            requirement = Requirement(text)
            if requirement.name == "cobra-edge":
                pending.remove(text)
                wanted += requirement.extras
    for text in pending:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found.append(requirement)
    return found


@pytest.mark.parametrize("name", FILES)
def test_versions_are_exact_and_from_nowhere_in_particular(name: str) -> None:
    assert len(pinned(name)) >= 10
    for requirement in pinned(name).values():
        assert requirement.url is None and [s.operator for s in requirement.specifier] == ["=="], str(requirement)
    assert not re.search(r"https?://|file:|--(extra-)?index|--find-links", (FOLDER / name).read_text())


@pytest.mark.parametrize("name", [name for name in FILES if name != "build.txt"])
def test_everything_declared_is_pinned_within_its_range(name: str) -> None:
    version = {"jetpack6.txt": "3.10", "jetpack7.txt": "3.12"}.get(name, name.removeprefix("python").removesuffix(".txt"))
    versions = pinned(name)
    for requirement in declared(FILES[name], {"python_version": version, "python_full_version": f"{version}.0"}):
        pin = versions[canonicalize_name(requirement.name)]
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version, prereleases=True), (
            f"{requirement} beside {pin}: run make constraints"
        )
    assert "pip" in versions


def test_the_cuda_bindings_that_are_tried_are_the_ends_of_what_the_extras_allow() -> None:
    (tried,) = re.findall(r"^CUDA_BINDINGS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    ends = iter(tried.split())
    for extra, low, high in zip(("jetpack6", "jetpack7"), ends, ends, strict=True):
        (requirement,) = map(Requirement, extras[extra])
        (floor,) = [s.version for s in requirement.specifier if s.operator == ">="]
        assert requirement.name == "cuda-bindings" and Version(low).release[:2] == (*Version(floor).release, 0)[:2]
        assert {str(s) for s in pinned(f"{extra}.txt")["cuda-bindings"].specifier} == {f"=={high}"}


def test_what_builds_the_package_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = pinned("build.txt")
    for text in project["build-system"]["requires"]:
        requirement = Requirement(text)
        (exact,) = versions[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(exact.version)


def test_every_install_of_ours_uses_them() -> None:
    """The Makefile, the action, the examples for CI and the containers install nothing without a constraint."""
    files = [
        ROOT / "action.yml",
        ROOT / "docs" / "regress-workflow.yml",
        ROOT / "docs" / "regress-gitlab.yml",
        ROOT / "export" / "containers" / "Dockerfile",
    ]
    for file in files:
        text = file.read_text().replace("\\\n", " ")
        for command in re.findall(r"pip (?:install|wheel) [^\n&]*", text):
            assert "--constraint" in command or "--build-constraint" in command, f"{file.name}: {command}"
