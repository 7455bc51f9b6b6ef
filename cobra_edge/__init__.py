"""cobra_edge: quantized Mamba vision-language models on the edge.

import cobra_edge
session = cobra_edge.load("bundles/cobra-mini-jetson-orin-nano-best")
print(session.ask("scene.png", "Is there a red circle?").read())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .environment import privacy  # noqa: F401  # first: libraries read its environment variables at import

# isort: split
from .errors import CobraEdgeError
from .version import __version__

if TYPE_CHECKING:
    from .bundle.reader import Bundle
    from .decode.decoder import DecoderOptions, DecoderState
    from .decode.sampling import Sampling
    from .inference.choices import Choices
    from .inference.session import Answer, Session, load

__all__ = [
    "Answer",
    "Bundle",
    "Choices",
    "CobraEdgeError",
    "DecoderOptions",
    "DecoderState",
    "Sampling",
    "Session",
    "__version__",
    "load",
]

# Imported when they are first used: numpy and pillow, which they import, take longer than `cobra-edge --help`.
_PLACES = {
    "Answer": "inference.session",
    "Bundle": "bundle.reader",
    "Choices": "inference.choices",
    "DecoderOptions": "decode.decoder",
    "DecoderState": "decode.decoder",
    "Sampling": "decode.sampling",
    "Session": "inference.session",
    "load": "inference.session",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_PLACES`. Source: PEP 562."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _PLACES.keys())
