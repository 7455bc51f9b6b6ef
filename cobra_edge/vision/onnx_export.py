"""Write the vision tower and projector as one ONNX graph, and prove that it computes what torch computes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ..errors import CobraEdgeError
from ..model.cobra import VisionModel
from ..model.config import CobraConfig
from .session import INPUT, OUTPUT, VisionSession

OPSET = 18  # what TensorRT 10.3 (JetPack 6) and current onnxruntime both read in full
EXTERNAL_DATA_ABOVE_BYTES = 1 << 30  # a protobuf file ends at 2 GiB
PARITY_RELATIVE_RMS = 1e-4


class ParityError(CobraEdgeError):
    """The exported graph does not compute what the torch model computes; nothing is written. The input is not at fault."""

    exit_code = 3


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """Return ‖got - expected‖ / ‖expected‖ of two arrays of one shape; NaN counts as infinity."""
    difference, size = np.linalg.norm(got.astype(np.float64) - expected), np.linalg.norm(expected)
    value = float(difference / (size + 1e-30))
    return value if np.isfinite(value) else float("inf")


def export_onnx(model: VisionModel, config: CobraConfig, file: Path) -> None:
    """Write the graph: INPUT (1, 3·n_encoders, size, size) to OUTPUT (1, n_visual_tokens, d_model), float32, static shapes.

    Weights go to `<file>.data` when they exceed EXTERNAL_DATA_ABOVE_BYTES. The graph is checked with onnx's checker.
    """
    assert config.vision is not None
    size = config.vision.image_size
    example = torch.zeros(1, 3 * len(config.vision.encoders), size, size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter prints its progress on stdout, which belongs to our caller's --json.
    with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    _forget_where_it_was_made(program.model)
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(file), external_data=weights_bytes > EXTERNAL_DATA_ABOVE_BYTES)
    del program
    onnx.checker.check_model(str(file))


def _forget_where_it_was_made(model: Any) -> None:
    """Drop the exporter's notes: they hold the builder's file paths, and make equal exports differ."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def check_parity(
    model: VisionModel, config: CobraConfig, file: Path, pixels: list[np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    """Compare the written graph with torch on normalised pixels (1, 3·n_encoders, size, size).

    Returns:
        The largest relative RMS difference, and torch's embeddings (n_visual_tokens, d_model) for each input.

    Raises:
        ParityError: the difference exceeds PARITY_RELATIVE_RMS.
    """
    session = VisionSession(file, config)
    worst, references = 0.0, []
    for p in pixels:
        with torch.inference_mode():
            reference = model(torch.from_numpy(p))[0].numpy()
        worst = max(worst, relative_rms(session.embed(p), reference))
        references.append(reference)
    if worst > PARITY_RELATIVE_RMS:
        raise ParityError(
            f"the ONNX graph differs from torch by a relative RMS of {worst:.2e}, at most {PARITY_RELATIVE_RMS:.0e} "
            "is allowed; please report the checkpoint and the versions of torch and onnxruntime"
        )
    return worst, references
