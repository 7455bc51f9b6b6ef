"""The vision part of an export: the graph in the requested precision, and an engine if one is built ahead of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..bundle.engine_key import EngineKey
from ..bundle.manifest import VisionGraph
from ..bundle.reader import IMAGE, VISION, file_sha256
from ..errors import InputError, MachineError
from ..formats.model_config import CobraConfig
from ..formats.precision import InputForm, PrecisionName, precision_named
from ..formats.targets import Target, why_not_precision
from ..suite.line_set import LineSet
from ..terminal.output import stages, tell
from ..terminal.suggestions import near_matches
from ..vision.engines import tensorrt_rtx

if TYPE_CHECKING:
    from ..quantize.calibration_data import EmbeddingCache

# An engine is built with its weights, without them (the graph has them too), or not at all. auto embeds one if the target runs
# it and the library is installed.
ENGINES = ("auto", "embedded", "stripped", "none")
# Of int8: more hardly change ranges, and an image of 729 positions takes half a minute.
_CALIBRATION_IMAGES = 64
_CALIBRATION_POSITIONS = 1 << 13


def checked_precision(target: Target, wanted: str | None) -> PrecisionName:
    """Return the precision to export in. Raises InputError if it is unknown or the target cannot run it."""
    precision = precision_named(wanted or target.vision_precision)
    reason = why_not_precision(target, precision)
    if reason is not None:
        raise InputError(f"--vision-precision {precision.name}: {reason}")
    return precision.name


def checked_engine(target: Target, wanted: str, precision: PrecisionName) -> str:
    """Return how to build an engine of a graph in `precision`: "embedded", "stripped" or "none".

    Raises:
        InputError: an unknown choice, or the target runs no engines built ahead of time, or none in this precision.
        MachineError: an engine was requested and its library is missing.
    """
    if wanted not in ENGINES:
        raise InputError(f"unknown --engine {wanted!r}{near_matches(wanted, ENGINES)}")
    if wanted == "none" or (wanted == "auto" and target.vision_runtime != tensorrt_rtx.RUNTIME):
        return "none"
    if target.vision_runtime != tensorrt_rtx.RUNTIME:
        raise InputError(
            f"--engine {wanted}: {target.title} runs no engine that is built ahead of time; omit it, and on a Jetson run: "
            "python -m cobra_edge.build BUNDLE"
        )
    missing = tensorrt_rtx.why_no_tensorrt_rtx()
    reason = missing or tensorrt_rtx.why_no_precision(precision, tensorrt_rtx.capabilities_of(target))
    if reason is None:
        return "embedded" if wanted == "auto" else wanted
    if wanted != "auto":
        raise (InputError if missing is None else MachineError)(f"--engine {wanted}: {reason}")
    tell(f"no engine for {target.title}: {reason}; the bundle has none, and onnxruntime runs its graph")
    return "none"


def write_vision(
    checkpoint: Any,
    images: Sequence[Path],
    stage: Path,
    precision: PrecisionName,
    form: InputForm,
    calibration: LineSet,
    cache: EmbeddingCache,
) -> VisionGraph | None:
    """Write vision.onnx and image.json into `stage`.

    Args:
        checkpoint: opened; without vision nothing is written.
        images: of the golden lines, each once.
        stage: directory of the bundle.
        precision: of the graph.
        form: input of the graph.
        calibration: lines for int8, which uses some of its images, evenly spaced: 64, or 11 of a model that takes 729
            positions for each.
        cache: receives the embeddings of all images that were seen.

    Returns:
        Properties of the graph; None for a text-only model.
    """
    config = checkpoint.config
    if config.vision is None:
        return None
    from ..model.cobra import load_vision
    from ..vision.graph.write import write_graph

    calibrate = calibration_images(calibration, config) if precision == "int8" else []
    with stages() as on_step:
        written = write_graph(lambda: load_vision(checkpoint), config, stage, precision, form, images, calibrate, on_step)
    (stage / IMAGE).write_bytes(msgspec.json.format(msgspec.json.encode(written.transform)) + b"\n")
    for image, embeddings in written.embeddings.items():
        cache.add(image, embeddings)
    return written.graph


def calibration_images(calibration: LineSet, config: CobraConfig) -> list[Path]:
    """Return the images of a calibration set that int8 vision is calibrated on."""
    most = min(_CALIBRATION_IMAGES, max(1, _CALIBRATION_POSITIONS // config.n_visual_tokens))
    return calibration.about(most).images()


def build_engine_ahead(stage: Path, precision: PrecisionName, target: Target, engine: str) -> dict[str, EngineKey]:
    """Build the engine of a staged graph as `checked_engine` returned it; returns its key by file name.

    Raises:
        InputError, MachineError: as `tensorrt_rtx.add_engine`.
    """
    if engine == "none":
        return {}
    files = {f.name: file_sha256(f) for f in stage.iterdir() if f.name.startswith(VISION)}
    with stages() as on_step:
        return tensorrt_rtx.add_engine(
            stage,
            files,
            precision,
            target,
            strip_weights=engine == "stripped",
            on_progress=lambda _phase, done, total: on_step(f"engine for {target.title}", done, total),
        )
