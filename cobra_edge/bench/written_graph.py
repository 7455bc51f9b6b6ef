"""A graph written by `bench vision`: run as on a device, and built into an engine, without torch.

python -m cobra_edge.bench.written_graph run DIRECTORY
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
from ..vision.engines.layer_summary import LayerSummary
from ..vision.session import VisionSession

_GRAPH, _CONFIG = "graph.json", "config.json"


class Opened(msgspec.Struct, frozen=True):
    """Time to open a graph."""

    open_seconds: float


class BuiltEngine(msgspec.Struct, frozen=True):
    """An engine: version, compute capabilities, time and peak memory of the build, size, layers."""

    version: str
    capabilities: tuple[str, ...]
    seconds: float
    peak_bytes: int
    bytes: int
    layers: LayerSummary


def keep_facts(directory: Path, config: CobraConfig, graph: VisionGraph) -> None:
    """Write the config and the description of a graph next to it."""
    (directory / _CONFIG).write_bytes(msgspec.json.encode(config))
    (directory / _GRAPH).write_bytes(msgspec.json.encode(graph))


def facts(directory: Path) -> tuple[CobraConfig, VisionGraph]:
    """Read what `keep_facts` wrote."""
    config = msgspec.json.decode((directory / _CONFIG).read_bytes(), type=CobraConfig)
    return config, msgspec.json.decode((directory / _GRAPH).read_bytes(), type=VisionGraph)


def open_written(directory: Path) -> VisionSession:
    """Open a graph on the CPU."""
    config, graph = facts(directory)
    return VisionSession(directory / VISION, config, graph.input, precision=graph.precision)


def noise_image(directory: Path) -> np.ndarray:
    """Return an image of noise as the graph takes it, (1, size, size, 3) uint8."""
    config, graph = facts(directory)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    return ImageTransform.of(config, graph.input).pixels(Image.fromarray(noise))


@click.group()
def command() -> None:
    """Run one step of `bench vision` in a process whose memory is measured; prints one JSON object."""


@command.command()
@click.argument("directory", type=click.Path(path_type=Path))
def run(directory: Path) -> None:
    """Open the graph, run it twice, and print the time to open it."""
    began = time.perf_counter()
    session = open_written(directory)
    seconds = time.perf_counter() - began
    for _ in range(2):
        if not np.isfinite(session.embed(noise_image(directory))).all():
            raise MachineError(f"{directory}: embeddings are not finite")
    print_json(Opened(seconds))


@command.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("target")
def engine(directory: Path, target: str) -> None:
    """Build a TensorRT for RTX engine next to the graph."""
    from ..vision.engines.tensorrt_rtx import add_engine

    _, graph = facts(directory)
    files = {f.name: file_sha256(f) for f in directory.iterdir() if f.name.startswith(VISION)}
    began = time.perf_counter()
    with stages() as on_step:
        keys = add_engine(
            directory, files, graph.precision, target_named(target), on_progress=lambda _, n, total: on_step("engine", n, total)
        )
    seconds = time.perf_counter() - began
    # The builder is a child process; the kernel keeps the peak of children that have exited.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    name, key = next(iter(keys.items()))
    layers = msgspec.json.decode((directory / name).with_suffix(".layers.json").read_bytes(), type=LayerSummary)
    size_bytes = (directory / name).stat().st_size
    print_json(BuiltEngine(key.version, tuple(key.capabilities), seconds, peak, size_bytes, layers))


main = main_of(command)

if __name__ == "__main__":
    main()
