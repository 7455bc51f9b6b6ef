"""Check of the libraries: which are installed, beside what was tested and what is declared."""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec
from packaging.utils import canonicalize_name

from ..formats.package_data import constraints
from .check import Check
from .jetson import jetpack
from .requirements import installed_version, requirements


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """An installed library.

    Attributes:
        name: of its distribution.
        version: installed.
        tested: the version that the tests ran with; None if none did on this Python.
        declared: the versions that this package allows, such as ">=1.26"; "" for all.
        allowed: whether the installed one is among them.
    """

    name: str
    version: str
    tested: str | None
    declared: str
    allowed: bool


class LibrariesCheck(Check, frozen=True, kw_only=True):
    """The installed libraries of those that this package declares, and those that every installation needs but lacks."""

    installed: tuple[Library, ...]
    lacking: tuple[str, ...]


def check_libraries() -> LibrariesCheck:
    """Check the versions of the libraries, from metadata: nothing is imported."""
    tested = _tested_versions()
    installed, lacking = [], []
    for declared in requirements():
        version = installed_version(declared.name)
        if version is not None:
            known = tested.get(canonicalize_name(declared.name))
            bounds, allowed = str(declared.versions), declared.allows(version)
            installed.append(Library(name=declared.name, version=version, tested=known, declared=bounds, allowed=allowed))
        elif not declared.optional:
            lacking.append(declared.name)
    refused = [f"{x.name} {x.version} ({x.declared} is needed)" for x in installed if not x.allowed]
    others = [f"{x.name} {x.version} (tested {x.tested})" for x in installed if x.tested not in (None, x.version)]
    if lacking or refused:
        told = [*(f"{name} is not installed" for name in lacking), *refused, "install the package again"]
        return LibrariesCheck(verdict="warning", text="; ".join(told), installed=tuple(installed), lacking=tuple(lacking))
    if not tested:
        text = f"{len(installed)} installed; no versions were tested on Python {_python()}"
    elif others:
        text = f"{len(installed)} installed, as tested but for {', '.join(others)}"
    else:
        text = f"{len(installed)} installed, all as tested"
    return LibrariesCheck(text=text, installed=tuple(installed), lacking=())


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _tested_versions() -> dict[str, str]:
    """Return the versions of the tests on this Python, or of the containers of this machine's JetPack; {} without a file."""
    return _pins(constraints() / f"{jetpack() or f'python{_python()}'}.txt")


def _pins(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pins = (line.partition(";")[0].strip().partition("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins if version}
