"""Compare a written graph with the torch model, at every encoder and at the projector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ...errors import CobraEdgeError
from ...formats.precision import PRECISIONS, PrecisionName
from ...model.cobra import VisionModel
from ..session import INPUT, OUTPUT, open_on_cpu
from .emulation import write_emulated
from .onnx_export import feature_name

PROJECTOR = "projector"


class ParityError(CobraEdgeError):
    """The exported graph differs from the torch model; nothing is written. The user's input is not the cause."""

    exit_code = 3


@dataclass(frozen=True, eq=False)
class Reference:
    """Torch's results for one input, float32.

    Attributes:
        features: (n_patches, embed_dim) of each encoder.
        embeddings: (n_visual_tokens, d_model).
    """

    features: tuple[np.ndarray, ...]
    embeddings: np.ndarray


@torch.inference_mode()
def reference(model: VisionModel, pixels: np.ndarray) -> Reference:
    """Run the model on normalized pixels (1, 3·n_encoders, size, size) float32, encoder by encoder."""
    tower: Any = model.tower
    parts = torch.from_numpy(pixels).chunk(len(tower.encoders), dim=1)
    features = [encoder(part) for encoder, part in zip(tower.encoders, parts, strict=True)]
    return Reference(tuple(f[0].numpy() for f in features), model.projector(torch.cat(features, dim=-1))[0].numpy())


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖got - expected‖ / ‖expected‖ of two float arrays of equal shape (any), any float dtype; infinity for NaN."""
    difference, size = np.linalg.norm(got.astype(np.float64) - expected), np.linalg.norm(expected)
    value = float(difference / (size + 1e-30))
    return value if np.isfinite(value) else float("inf")


def measure_parity(
    graph: Path,
    precision: PrecisionName,
    inputs: Sequence[np.ndarray],
    references: Sequence[Reference],
    on_input: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Compare a written graph with torch; the rounding of 16-bit graphs is emulated (`emulation`).

    Args:
        graph: the file; a copy with the features as outputs is written next to it and removed.
        precision: of the graph.
        inputs: each (n_squares, size, size, 3) uint8 or (1, 3·n_encoders, size, size) float32, as the graph takes them.
        references: torch's results for the same inputs.
        on_input: called after each input, for progress.

    Returns:
        The largest relative RMS error of "encoder 0", …, "projector".
    """
    names = [feature_name(i) for i in range(len(references[0].features))]
    reference = graph.with_name(f"parity-{graph.name}")
    try:
        if precision in ("fp16", "bf16"):
            write_emulated(graph, reference)
        _add_outputs(reference if reference.exists() else graph, reference, names)
        session = open_on_cpu(reference)
    finally:
        reference.unlink(missing_ok=True)
    worst = dict.fromkeys([f"encoder {i}" for i in range(len(names))] + [PROJECTOR], 0.0)
    for taken, expected in zip(inputs, references, strict=True):
        *features, embeddings = session.run([*names, OUTPUT], {INPUT: taken})
        pairs = zip(worst, [*features, embeddings], [*expected.features, expected.embeddings], strict=True)
        for at, got, wanted in pairs:
            worst[at] = max(worst[at], relative_rms(got[0], wanted))
        on_input()
    return worst


def require_parity(parity: dict[str, float], precision: PrecisionName) -> None:
    """Raise ParityError if an error exceeds the precision's limit, or is not finite."""
    limit = PRECISIONS[precision].relative_rms_max
    at, worst = max(parity.items(), key=lambda item: item[1])
    if not worst <= limit:
        advice = "report the checkpoint and the versions of torch and onnxruntime" if precision == "fp32" else _WIDER
        raise ParityError(
            f"the {precision} vision graph has a relative RMS error of {worst:.2e} at {at} against torch, at most {limit:.0e} "
            f"is allowed; {advice}"
        )


_WIDER = "this model exceeds the range of this precision, use a wider --vision-precision"


def _add_outputs(graph: Path, reference: Path, names: Sequence[str]) -> None:
    """Write a copy of the graph with some of its values as additional outputs."""
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    reference.write_bytes(model.SerializeToString())
