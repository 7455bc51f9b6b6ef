"""A graph that `bench vision` wrote, run as a device would run it: without torch.

python -m cobra_edge.bench.written_graph DIRECTORY
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from ..bundle import VISION, VisionGraph
from ..errors import MachineError
from ..image import ImageTransform
from ..model.config import CobraConfig
from ..terminal import print_json
from ..vision.session import VisionSession

_GRAPH, _CONFIG = "graph.json", "config.json"


def keep_facts(directory: Path, config: CobraConfig, graph: VisionGraph) -> None:
    """Write beside a graph what it belongs to and how it was made."""
    (directory / _CONFIG).write_bytes(msgspec.json.encode(config))
    (directory / _GRAPH).write_bytes(msgspec.json.encode(graph))


def facts(directory: Path) -> tuple[CobraConfig, VisionGraph]:
    """Return what `keep_facts` wrote."""
    config = msgspec.json.decode((directory / _CONFIG).read_bytes(), type=CobraConfig)
    return config, msgspec.json.decode((directory / _GRAPH).read_bytes(), type=VisionGraph)


def open_written(directory: Path) -> VisionSession:
    """Open the graph on the CPU."""
    config, graph = facts(directory)
    return VisionSession(directory / VISION, config, graph.input, precision=graph.precision)


def a_picture(directory: Path) -> np.ndarray:
    """Return a picture of noise as the graph takes it."""
    config, graph = facts(directory)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    return ImageTransform.of(config, graph.input).pixels(Image.fromarray(noise))


def main() -> None:
    """Open the graph, look twice, and print how long opening took."""
    directory = Path(sys.argv[1])
    began = time.perf_counter()
    session = open_written(directory)
    seconds = time.perf_counter() - began
    for _ in range(2):
        if not np.isfinite(session.embed(a_picture(directory))).all():
            raise MachineError(f"{directory}: embeddings that are not finite")
    print_json({"open_seconds": seconds})


if __name__ == "__main__":
    main()
