"""The libraries that this package declares, and which versions are installed: from metadata, nothing is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement as Declared
from packaging.specifiers import SpecifierSet

_SELF = "cobra-edge"
# Distributions that bring the same module.
_INSTEAD = {"onnxruntime": ("onnxruntime-gpu",)}


@dataclass(frozen=True)
class Requirement:
    """A declared library.

    Attributes:
        name: of its distribution.
        versions: that are allowed.
        optional: whether only an extra needs it.
    """

    name: str
    versions: SpecifierSet
    optional: bool

    def allows(self, version: str) -> bool:
        """Return whether a version is among those that are allowed, a pre-release of them included."""
        return self.versions.contains(version, prereleases=True)


def requirements() -> tuple[Requirement, ...]:
    """Return what this package declares for this Python and platform, each library once; what is not optional first.

    Nothing if it is on the path without being installed.
    """
    try:
        about = metadata.metadata(_SELF)
    except metadata.PackageNotFoundError:
        return ()
    extras, found = about.get_all("Provides-Extra") or [], dict[str, Requirement]()
    for declared in map(Declared, about.get_all("Requires-Dist") or []):
        always = declared.marker is None or declared.marker.evaluate({"extra": ""})
        wanted = always or any(declared.marker.evaluate({"extra": e}) for e in extras if declared.marker)
        if wanted and declared.name != _SELF:  # itself: an extra that has another one
            found.setdefault(declared.name, Requirement(declared.name, declared.specifier, not always))
    return tuple(sorted(found.values(), key=lambda r: r.optional))


def base_requirements() -> tuple[Requirement, ...]:
    """Return the libraries that every installation needs."""
    return tuple(r for r in requirements() if not r.optional)


def installed_version(name: str) -> str | None:
    """Return the version of a library, or of a distribution that brings the same module; None if it is not installed."""
    for distribution in (name, *_INSTEAD.get(name, ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
