"""A graph that `bench vision` wrote: run as a device would run it, and made into an engine. Without torch.

python -m cobra_edge.bench.written_graph look DIRECTORY
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import click
import msgspec
import numpy as np
from PIL import Image

from ..bundle.manifest import VisionGraph
from ..bundle.reader import VISION, file_sha256
from ..errors import MachineError
from ..formats.model_config import CobraConfig
from ..formats.targets import target_named
from ..inputs.image import ImageTransform
from ..terminal.output import main_of, print_json, stages
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


def a_image(directory: Path) -> np.ndarray:
    """Return an image of noise as the graph takes it."""
    config, graph = facts(directory)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    return ImageTransform.of(config, graph.input).pixels(Image.fromarray(noise))


@click.group()
def command() -> None:
    """Take a step of `bench vision` whose memory is its own; prints one JSON object."""


@command.command()
@click.argument("directory", type=click.Path(path_type=Path))
def look(directory: Path) -> None:
    """Open the graph, look twice, and say how long opening took."""
    began = time.perf_counter()
    session = open_written(directory)
    seconds = time.perf_counter() - began
    for _ in range(2):
        if not np.isfinite(session.embed(a_image(directory))).all():
            raise MachineError(f"{directory}: embeddings that are not finite")
    print_json({"open_seconds": seconds})


@command.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("target")
def engine(directory: Path, target: str) -> None:
    """Build an engine of TensorRT for RTX beside the graph."""
    from ..vision.engines.tensorrt_rtx import add_engine

    _, graph = facts(directory)
    files = {f.name: file_sha256(f) for f in directory.iterdir() if f.name.startswith(VISION)}
    began = time.perf_counter()
    with stages() as on_step:
        keys = add_engine(
            directory, files, graph.precision, target_named(target), on_progress=lambda _, n, total: on_step("engine", n, total)
        )
    seconds = time.perf_counter() - began
    # The builder is a child, which begins as small as this process; the kernel keeps its mark when it has gone.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    sizes = {name: (directory / name).stat().st_size for name in keys}
    layers = [(directory / name).with_suffix(".layers.json").read_bytes() for name in keys]
    print_json({"keys": keys, "seconds": seconds, "peak_bytes": peak, "bytes": sizes, "layers": msgspec.json.decode(layers[0])})


main = main_of(command)

if __name__ == "__main__":
    main()
