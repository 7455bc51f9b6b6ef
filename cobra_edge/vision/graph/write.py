"""Write vision.onnx from vision tower and projector, and check it against torch before it is kept."""

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
_COMPARED = 16  # images on which parity is measured
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class WrittenGraph:
    """Result of `write_graph`.

    Attributes:
        graph: its entry in the manifest.
        transform: its input transform.
        embeddings: the float model's (n_visual_tokens, d_model) float32, by file: of `images`, and of `calibration` for int8.
    """

    graph: VisionGraph
    transform: ImageTransform
    embeddings: dict[Path, np.ndarray]


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
    """Write VISION into `stage`, and measure its error against float32 torch.

    Args:
        load: returns tower and projector in float32; they are freed once they are written.
        config: of their model.
        stage: directory for VISION and its external data.
        precision: of the matmuls.
        form: input form of the graph.
        images: their embeddings are returned; parity is measured on some of them and on noise (int8: on a calibration image).
        calibration: images for the activation scales of int8.
        on_step: called with a stage's name, the steps done and their total.

    Raises:
        InputError: an image cannot be read, there is none to calibrate with, or activations are not finite.
        ParityError: the error is too large; the files are left in `stage`.
    """
    if precision == "int8" and not calibration:
        raise InputError("int8 vision is calibrated on images, but the suite has none; give one with images: --calibration")
    transform = ImageTransform.of(config, form)
    calibration = calibration if precision == "int8" else ()
    squares = {f: _squares(config, f) for f in images}
    # Noise would exceed the range that int8 was calibrated for.
    beside = _squares(config, calibration[0]) if calibration else _noise(config)
    model, seen = load(), _Seen({*images[:_COMPARED], *calibration[:1]})
    alone = {f: squares[f] for f in squares if f not in set(calibration)}  # the others are seen while activations are observed
    _embed(model, transform, alone, seen, on_step)
    extra = [] if calibration else [reference(model, transform.normalised(beside))]
    with tempfile.TemporaryDirectory(dir=stage, prefix=".float-") as folder:
        # int8 is made from a temporary float graph.
        first, numbers = (stage / VISION, precision) if not calibration else (Path(folder) / VISION, FLOAT)
        if calibration:
            on_step("SmoothQuant", 0, 1)
            _smooth(model, [transform.normalised(_squares(config, f)) for f in calibration], calibration, seen)
            extra = [seen.references[calibration[0]]]
        on_step(f"vision graph as {numbers}", 0, 1)
        export_onnx(model, transform, first, numbers)
        del model
        wide = _quantize(first, stage / VISION, transform, calibration, on_step) if calibration else {}
    inputs = [_taken(transform, s) for s in (*[squares[f] for f in images[:_COMPARED]], beside)]
    references = [*[seen.references[f] for f in images[:_COMPARED]], *extra]
    parity = _parity(stage / VISION, precision, inputs, references, on_step)
    require_parity(parity, precision)
    graph = VisionGraph(precision, form, {at: float(f"{value:.4g}") for at, value in parity.items()}, wide)
    return WrittenGraph(graph, transform, seen.embeddings)


class _Seen:
    """Results of the float model: the embeddings of all images, and the features of those that the graph is compared on."""

    def __init__(self, compared: set[Path]) -> None:
        self._compared = compared
        self.embeddings, self.references = dict[Path, np.ndarray](), dict[Path, Reference]()

    def add(self, file: Path, found: Reference) -> None:
        self.embeddings[file] = found.embeddings
        if file in self._compared:
            self.references[file] = found


def _embed(
    model: VisionModel, transform: ImageTransform, squares: dict[Path, np.ndarray], seen: _Seen, on_step: OnStep
) -> None:
    """Run the float model on images, (n_squares, size, size, 3) uint8 by file; its results are added to `seen`."""
    for n, (file, square) in enumerate(squares.items()):
        on_step("vision tower in torch", n, len(squares) + 1)
        seen.add(file, reference(model, transform.normalised(square)))
    on_step("vision tower in torch", len(squares), len(squares) + 1)


def _smooth(model: VisionModel, pixels: Sequence[np.ndarray], files: Sequence[Path], seen: _Seen) -> None:
    """Apply SmoothQuant to a model in place; its results for the calibration images before that are added to `seen`."""
    names = iter(files)
    apply_smoothquant(model, pixels, lambda image: seen.add(next(names), reference(model, image)))


def _squares(config: CobraConfig, file: Path) -> np.ndarray:
    """Return an image as (n_squares, size, size, 3) uint8."""
    return ImageTransform.of(config, "uint8").pixels(load_image(file))


def _noise(config: CobraConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, ImageTransform.of(config, "uint8").shape, np.uint8)


def _taken(transform: ImageTransform, squares: np.ndarray) -> np.ndarray:
    """Return squares in the graph's input form."""
    return squares if transform.input == "uint8" else transform.normalised(squares)


def _quantize(
    float_graph: Path, out: Path, transform: ImageTransform, calibration: Sequence[Path], on_step: OnStep
) -> dict[str, float]:
    """Write the int8 graph; return the matmuls left wide, with the error that int8 would have there."""
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
