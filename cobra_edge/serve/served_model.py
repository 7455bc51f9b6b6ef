"""The model that a server serves: its name, and what distinguishes its answers from any other's."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass

from ..bundle.reader import MANIFEST
from ..inference.session import Session
from ..version import __version__
from .errors import Refusal
from .schemas import Model


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A session with a name.

    Attributes:
        session: of the model.
        name: what clients call it.
        created: when its bundle was made, seconds since 1970.
        fingerprint: of everything that decides the bits of an answer: hexadecimal.
    """

    session: Session
    name: str
    created: int
    fingerprint: str

    @classmethod
    def of(cls, session: Session, name: str | None = None) -> ServedModel:
        """Return a session under a name; its model's own by default."""
        manifest = session.bundle.directory / MANIFEST
        created = int(manifest.stat().st_mtime)
        return cls(session, name or session.config.model_id, created, _fingerprint(session, manifest.read_bytes()))

    def require(self, name: str) -> None:
        """Raise Refusal when a client wants another model."""
        if name != self.name:
            raise Refusal(
                404, f"there is no model {name[:100]!r} here; this server has {self.name!r}", "model_not_found", "model"
            )

    def described(self) -> Model:
        """Return what clients are told of it."""
        return Model(id=self.name, created=self.created)


def _fingerprint(session: Session, manifest: bytes) -> str:
    """Return a name for the bits that this bundle's states have here: the manifest holds every file's hash."""
    decoder, vision = session.decoder, session.vision
    runs = {
        "cobra_edge": __version__,
        "decoder": [decoder.name, decoder.runs_on, decoder.activations, getattr(decoder, "kernels", "")],
        "vision": None if vision is None else [vision.name, getattr(sys.modules.get("onnxruntime"), "__version__", None)],
    }
    return hashlib.sha256(manifest + json.dumps(runs).encode()).hexdigest()[:32]
