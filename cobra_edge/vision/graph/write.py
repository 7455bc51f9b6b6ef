"""Vision tower and projector become vision.onnx, proven against torch before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...bundle.manifest import VisionGraph
from ...bundle.reader import VISION
from ...errors import InputError
from ...formats.model_config import CobraConfig
from ...formats.precision import InputForm, PrecisionName
from ...inputs.image import ImageTransform, load_image
from ...model.cobra import VisionModel
from .int8 import quantize_int8
from .onnx_export import export_onnx
from .parity import Reference, measure_parity, reference, require_parity
from .smoothquant import apply_smoothquant

FLOAT: PrecisionName = "fp32"
_COMPARED = 16  # images that parity is measured on
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class WrittenGraph:
    """What was written.

    Attributes:
        graph: how it was made.
        transform: what it takes.
        embeddings: the float model's (n_visual_tokens, d_model) float32 of each image.
    """

    graph: VisionGraph
    transform: ImageTransform
    embeddings: list[np.ndarray]


def write_graph(
    load: Callable[[], VisionModel],
    config: CobraConfig,
    stage: Path,
    precision: PrecisionName,
    form: InputForm,
    images: Sequence[Path],
    calibration: Sequence[Path] = (),
    on_step: OnStep = lambda name, done, total: None,
) -> WrittenGraph:
    """Write VISION into `stage`, and measure its distance from torch in float32.

    Args:
        load: gives tower and projector in float32; they are freed as soon as they are written.
        config: of the model they belong to.
        stage: directory for VISION and its external data.
        precision: of the matrix products.
        form: what the graph takes.
        images: whose embeddings are wanted; on some of them parity is measured, beside one of noise, or for int8 one of those
            it was calibrated with.
        calibration: images that int8 takes its activations' scales of.
        on_step: told a stage's name, how much of it is done, and of what.

    Raises:
        InputError: an image cannot be read, there is none to calibrate with, or activations are not finite.
        ParityError: the graph is not what it should be; its files are left in `stage`.
    """
    if precision == "int8" and not calibration:
        raise InputError("int8 vision is calibrated on images, the suite has none; give one that has, with --calibration")
    transform = ImageTransform.of(config, form)
    squares = [_squares(config, f) for f in images]
    # Noise is no image: it would land beyond what int8 was calibrated for.
    beside = _squares(config, calibration[0]) if precision == "int8" else _noise(config)
    model = load()
    references: list[Reference] = []
    embeddings: list[np.ndarray] = []
    for n, square in enumerate([*squares, beside]):
        on_step("vision tower in torch", n, len(squares) + 1)
        found = reference(model, transform.normalised(square))
        embeddings.append(found.embeddings)
        if n < _COMPARED or square is beside:
            references.append(found)
    compared = [*squares[:_COMPARED], beside]
    with tempfile.TemporaryDirectory(dir=stage, prefix=".float-") as folder:
        # int8 is made of a float graph that nobody needs afterwards.
        first, numbers = (stage / VISION, precision) if precision != "int8" else (Path(folder) / VISION, FLOAT)
        if precision == "int8":
            on_step("SmoothQuant", 0, 1)
            apply_smoothquant(model, [transform.normalised(_squares(config, f)) for f in calibration])
        on_step(f"vision graph as {numbers}", 0, 1)
        export_onnx(model, transform, first, numbers)
        del model
        wide = {} if first == stage / VISION else _quantize(first, stage / VISION, transform, calibration, on_step)
    parity = _parity(stage / VISION, precision, [_taken(transform, s) for s in compared], references, on_step)
    require_parity(parity, precision)
    graph = VisionGraph(precision, form, {at: float(f"{value:.4g}") for at, value in parity.items()}, wide)
    return WrittenGraph(graph, transform, embeddings[: len(squares)])


def _squares(config: CobraConfig, file: Path) -> np.ndarray:
    """Return an image as (n_squares, size, size, 3) uint8."""
    return ImageTransform.of(config, "uint8").pixels(load_image(file))


def _noise(config: CobraConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, ImageTransform.of(config, "uint8").shape, np.uint8)


def _taken(transform: ImageTransform, squares: np.ndarray) -> np.ndarray:
    """Return squares as the graph takes them."""
    return squares if transform.input == "uint8" else transform.normalised(squares)


def _quantize(
    float_graph: Path, out: Path, transform: ImageTransform, calibration: Sequence[Path], on_step: OnStep
) -> dict[str, float]:
    """Write the int8 graph; return the products left wide with the error that int8 would have had there."""
    label, taken = "vision graph as int8", [transform.pixels(load_image(f)) for f in calibration]
    done = iter(range(1, len(taken) + 1))
    on_step(label, 0, len(taken))
    report = quantize_int8(float_graph, out, taken, on_step=lambda: on_step(label, next(done), len(taken)))
    return {w.matmul: float(f"{w.error:.4g}") for w in report.wide}


def _parity(
    file: Path,
    precision: PrecisionName,
    inputs: Sequence[np.ndarray],
    references: Sequence[Reference],
    on_step: OnStep,
) -> dict[str, float]:
    label, done = "vision graph against torch", iter(range(1, len(inputs) + 1))
    on_step(label, 0, len(inputs))
    return measure_parity(file, precision, inputs, references, lambda: on_step(label, next(done), len(inputs)))
