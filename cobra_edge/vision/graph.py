"""A checkpoint's vision tower and projector become vision.onnx, proven against torch before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import VISION, VisionGraph
from ..image import ImageTransform, load_picture
from ..model.checkpoint import Checkpoint
from ..model.cobra import load_vision
from ..precision import InputForm, PrecisionName
from .onnx_export import export_onnx
from .parity import Reference, measure_parity, reference, require_parity


@dataclass(frozen=True, eq=False)
class WrittenGraph:
    """What was written.

    Attributes:
        graph: how it was made.
        transform: what it takes.
        embeddings: the float model's (n_visual_tokens, d_model) float32 of each picture.
    """

    graph: VisionGraph
    transform: ImageTransform
    embeddings: list[np.ndarray]


def write_graph(
    checkpoint: Checkpoint,
    stage: Path,
    precision: PrecisionName,
    form: InputForm,
    pictures: Sequence[Path],
    calibration: Sequence[Path],
    on_step: Callable[[str, int, int], None],
) -> WrittenGraph:
    """Write VISION into `stage`, and measure its distance from torch in float32.

    Args:
        checkpoint: with vision.
        stage: directory for VISION and its external data.
        precision: of the matrix products.
        form: what the graph takes.
        pictures: what parity is measured on, beside one picture of noise.
        calibration: pictures that int8 takes its activations' scales of.
        on_step: told a stage's name, how much of it is done, and of what.

    Raises:
        InputError: a picture cannot be read, weights are not finite. ParityError: the graph is not what it should be.
    """
    model, transform = load_vision(checkpoint), ImageTransform.of(checkpoint.config, form)
    squares = [ImageTransform.of(checkpoint.config, "uint8").pixels(load_picture(f)) for f in pictures]
    # Noise is no picture: it would land beyond what int8 was calibrated for.
    noise = [] if precision == "int8" else [np.random.default_rng(0).integers(0, 256, s.shape, np.uint8) for s in squares[:1]]
    references: list[Reference] = []
    for n, square in enumerate(squares + noise):
        on_step("vision tower in torch", n, len(squares + noise))
        references.append(reference(model, transform.normalised(square)))
    on_step(f"vision graph as {precision}", 0, 1)
    export_onnx(model, transform, stage / VISION, precision)
    del model
    inputs = [square if form == "uint8" else transform.normalised(square) for square in squares + noise]
    done = iter(range(len(inputs) + 1))
    label = "vision graph against torch"
    on_step(label, next(done), len(inputs))
    parity = measure_parity(stage / VISION, precision, inputs, references, lambda: on_step(label, next(done), len(inputs)))
    require_parity(parity, precision)
    graph = VisionGraph(precision, form, {at: float(f"{value:.4g}") for at, value in parity.items()})
    return WrittenGraph(graph, transform, [r.embeddings for r in references[: len(squares)]])
