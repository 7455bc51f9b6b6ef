"""Prove that a written graph computes what the torch model computes, at every encoder and at the projector."""

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
    """The exported graph does not compute what the torch model computes; nothing is written. The input is not at fault."""

    exit_code = 3


@dataclass(frozen=True, eq=False)
class Reference:
    """What torch makes of one input in float32: features (n_patches, embed_dim) of each encoder, and embeddings."""

    features: tuple[np.ndarray, ...]
    embeddings: np.ndarray


@torch.inference_mode()
def reference(model: VisionModel, pixels: np.ndarray) -> Reference:
    """Run the model on normalised pixels (1, 3·n_encoders, size, size) float32, encoder by encoder."""
    tower: Any = model.tower
    parts = torch.from_numpy(pixels).chunk(len(tower.encoders), dim=1)
    features = [encoder(part) for encoder, part in zip(tower.encoders, parts, strict=True)]
    return Reference(tuple(f[0].numpy() for f in features), model.projector(torch.cat(features, dim=-1))[0].numpy())


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖got - expected‖ / ‖expected‖ of two arrays of one shape; NaN counts as infinity."""
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
    """Compare a written graph with torch; 16-bit graphs as a device computes them (`emulation`).

    Args:
        graph: the file; a reference with the features as outputs lies beside it for the time being.
        precision: of the graph.
        inputs: as the graph takes them.
        references: torch's, of the same inputs.
        on_input: called after each, for progress.

    Returns:
        The largest relative RMS of "encoder 0", …, "projector".
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
    """Raise ParityError where a distance exceeds the precision's limit, or is not finite."""
    limit = PRECISIONS[precision].relative_rms_max
    at, worst = max(parity.items(), key=lambda item: item[1])
    if not worst <= limit:
        advice = "report the checkpoint and the versions of torch and onnxruntime" if precision == "fp32" else _WIDER
        raise ParityError(
            f"the {precision} vision graph differs from torch by a relative RMS of {worst:.2e} at {at}, at most {limit:.0e} is "
            f"allowed; {advice}"
        )


_WIDER = "this model does not fit into these numbers, take a wider --vision-precision"


def _add_outputs(graph: Path, reference: Path, names: Sequence[str]) -> None:
    """Write the graph again with values of it as further outputs."""
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    reference.write_bytes(model.SerializeToString())
