"""cobra_edge: quantized Mamba vision-language models on the edge.

import cobra_edge
session = cobra_edge.load("bundles/cobra-mini-jetson-orin-nano-best")
print(session.ask("scene.png", "Is there a red circle?").read())
"""

from .environment import privacy  # noqa: F401  # first: libraries read its environment variables at import

# isort: split
from .bundle.reader import Bundle
from .decode.decoder import DecoderOptions, DecoderState
from .decode.sampling import Sampling
from .errors import CobraEdgeError
from .inference.session import Answer, Session, load
from .version import __version__

__all__ = [
    "Answer",
    "Bundle",
    "CobraEdgeError",
    "DecoderOptions",
    "DecoderState",
    "Sampling",
    "Session",
    "__version__",
    "load",
]
