"""The model that a server serves: session, name, fingerprint."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass

from ..bundle.reader import MANIFEST
from ..inference.session import Session
from ..version import __version__
from .errors import ApiError
from .schemas import Model


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A session with a name.

    Attributes:
        session: of the model.
        name: model name in requests.
        created: when its bundle was made, seconds since 1970.
        fingerprint: hash, hexadecimal, of all that determines the bits of an answer.
    """

    session: Session
    name: str
    created: int
    fingerprint: str

    @classmethod
    def of(cls, session: Session, name: str | None = None) -> ServedModel:
        """Return a session with a name, by default that of its model."""
        manifest = session.bundle.directory / MANIFEST
        created = int(manifest.stat().st_mtime)
        return cls(session, name or session.config.model_id, created, _fingerprint(session, manifest.read_bytes()))

    def require(self, name: str) -> None:
        """Raise ApiError 404 where a request names another model."""
        if name != self.name:
            raise ApiError(404, f"unknown model {name[:100]!r}; this server has {self.name!r}", "model_not_found", "model")

    def to_schema(self) -> Model:
        """Return the model object of the API."""
        return Model(id=self.name, created=self.created)


def _fingerprint(session: Session, manifest: bytes) -> str:
    """Return a hash of manifest (which has every file's hash), version and runtimes: states of equal fingerprint are equal."""
    decoder, vision = session.decoder, session.vision
    runs = {
        "cobra_edge": __version__,
        "decoder": [decoder.name, decoder.runs_on, decoder.activations, getattr(decoder, "kernels", "")],
        "vision": None if vision is None else [vision.name, getattr(sys.modules.get("onnxruntime"), "__version__", None)],
    }
    return hashlib.sha256(manifest + json.dumps(runs).encode()).hexdigest()[:32]
