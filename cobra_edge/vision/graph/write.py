"""Vision tower and projector become vision.onnx, proven against torch before it is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...bundle import VISION, VisionGraph
from ...errors import InputError
from ...image import ImageTransform, load_picture
from ...model.cobra import VisionModel
from ...model.config import CobraConfig
from ...precision import InputForm, PrecisionName
from .int8 import quantize_int8
from .onnx_export import export_onnx
from .parity import Reference, measure_parity, reference, require_parity
from .smoothing import smoothed

OnStep = Callable[[str, int, int], None]


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
    model: VisionModel,
    config: CobraConfig,
    stage: Path,
    precision: PrecisionName,
    form: InputForm,
    pictures: Sequence[Path],
    calibration: Sequence[Path] = (),
    on_step: OnStep = lambda name, done, total: None,
) -> WrittenGraph:
    """Write VISION into `stage`, and measure its distance from torch in float32.

    Args:
        model: tower and projector in float32; of no other use afterwards.
        config: of the model it belongs to.
        stage: directory for VISION and its external data.
        precision: of the matrix products.
        form: what the graph takes.
        pictures: what parity is measured on, beside one picture of noise.
        calibration: pictures that int8 takes its activations' scales of.
        on_step: told a stage's name, how much of it is done, and of what.

    Raises:
        InputError: a picture cannot be read, there is none to calibrate with or to judge int8 by, or activations overflow.
        ParityError: the graph is not what it should be; its files are left in `stage`.
    """
    transform = ImageTransform.of(config, form)
    squares = [ImageTransform.of(config, "uint8").pixels(load_picture(f)) for f in pictures]
    # Noise is no picture: it would land beyond what int8 was calibrated for.
    noise = [] if precision == "int8" else [np.random.default_rng(0).integers(0, 256, _shape(config), np.uint8)]
    if not squares + noise:
        raise InputError(
            f"{precision} vision is judged on pictures, the golden lines have none; give --golden a suite that has"
        )
    references: list[Reference] = []
    for n, square in enumerate(squares + noise):
        on_step("vision tower in torch", n, len(squares + noise))
        references.append(reference(model, transform.normalised(square)))
    if precision == "int8":
        wide = _write_int8(model, transform, stage, calibration, on_step)
    else:
        on_step(f"vision graph as {precision}", 0, 1)
        export_onnx(model, transform, stage / VISION, precision)
        wide = {}
    del model
    label, inputs = "vision graph against torch", [s if form == "uint8" else transform.normalised(s) for s in squares + noise]
    done = iter(range(1, len(inputs) + 1))
    on_step(label, 0, len(inputs))
    parity = measure_parity(stage / VISION, precision, inputs, references, lambda: on_step(label, next(done), len(inputs)))
    require_parity(parity, precision)
    graph = VisionGraph(precision, form, {at: float(f"{value:.4g}") for at, value in parity.items()}, wide)
    return WrittenGraph(graph, transform, [r.embeddings for r in references[: len(squares)]])


def _shape(config: CobraConfig) -> tuple[int, ...]:
    return ImageTransform.of(config, "uint8").shape


def _write_int8(
    model: VisionModel, transform: ImageTransform, stage: Path, calibration: Sequence[Path], on_step: OnStep
) -> dict[str, float]:
    """Write the int8 graph by way of a float one; return the products left wide with the error that int8 would have there."""
    if not calibration:
        raise InputError("int8 vision is calibrated on pictures, the suite has none; give one that has, with --calibration")
    taken = [transform.pixels(load_picture(f)) for f in calibration]
    float_form = ImageTransform(transform.image_size, transform.resize_strategy, transform.encoders)
    on_step("smoothing", 0, 1)
    model = smoothed(model, [float_form.pixels(load_picture(f)) for f in calibration])
    with tempfile.TemporaryDirectory(dir=stage, prefix=".float-") as folder:
        float_graph = Path(folder) / VISION
        on_step("vision graph as fp32", 0, 1)
        export_onnx(model, transform, float_graph)
        del model
        done = iter(range(1, len(taken) + 1))
        on_step("vision graph as int8", 0, len(taken))
        report = quantize_int8(
            float_graph, stage / VISION, taken, on_step=lambda: on_step("vision graph as int8", next(done), len(taken))
        )
    return {w.product: float(f"{w.error:.4g}") for w in report.wide}
