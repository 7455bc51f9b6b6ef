"""The vision towers that `bench vision` measures; a child process writes the graph of one.

python -m cobra_edge.bench.vision_towers cobra-3b fp16 DIRECTORY
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
import torch
from torch import nn

from ..bundle.manifest import VisionGraph
from ..formats.model_config import CobraConfig, projector_kind
from ..formats.precision import PrecisionName
from ..model.backbones import vision_backbone
from ..model.checkpoint import open_checkpoint
from ..model.cobra import VisionModel, load_vision
from ..model.projector import Projector
from ..model.vision import VisionTower
from ..suite.line_set import LineSet
from ..suite.reader import HELDOUT
from ..terminal.output import main_of, print_json, stages
from ..vision.graph.write import write_graph
from .shapes import shape_named
from .written_graph import keep_facts

TRAINED = "cobra-mini"
_PARITY_IMAGES, _CALIBRATION_IMAGES = 2, 8  # a full-size tower takes seconds per image


class Written(msgspec.Struct, frozen=True):
    """The graph that was written."""

    graph: VisionGraph


def config_of(shape: str) -> CobraConfig:
    """Return the config of a shape. Raises InputError for an unknown one."""
    if shape == TRAINED:
        return open_checkpoint("mini").config
    named = shape_named(shape)
    kind = projector_kind(named.arch_specifier)
    return CobraConfig(shape, vision_backbone(named.vision_backbone_id), kind, named.mamba)


def tower(shape: str) -> VisionModel:
    """Return the vision tower of a shape: trained for cobra-mini, with random weights for the others.

    Layer scales are initialised to 1e-5, with which blocks, and rounding errors in them, would hardly matter: set to 1.
    """
    if shape == TRAINED:
        return load_vision(open_checkpoint("mini"))
    config = config_of(shape)
    assert config.vision is not None and config.projector is not None
    torch.manual_seed(0)
    projector = Projector(config.projector, config.vision.feature_dim, config.mamba.d_model)
    model = VisionModel(VisionTower(config.vision), projector).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            nn.init.ones_(parameter)
    return model


@click.command()
@click.argument("shape")
@click.argument("precision")
@click.argument("directory", type=click.Path(path_type=Path))
def command(shape: str, precision: PrecisionName, directory: Path) -> None:
    """Write the graph of SHAPE into DIRECTORY and verify it against torch; its input are uint8 images."""
    directory.mkdir()
    every = slice(None) if shape == TRAINED else slice(_CALIBRATION_IMAGES)
    with stages() as on_step:
        written = write_graph(
            lambda: tower(shape),
            config_of(shape),
            directory,
            precision,
            "uint8",
            LineSet.of_suite(HELDOUT).images()[:_PARITY_IMAGES],
            LineSet.embedded().images()[every],
            on_step,
        )
    keep_facts(directory, config_of(shape), written.graph)
    print_json(Written(written.graph))


main = main_of(command)

if __name__ == "__main__":
    main()
