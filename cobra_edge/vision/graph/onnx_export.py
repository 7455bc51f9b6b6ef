"""Export the vision tower and projector as one ONNX graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ...formats.precision import PrecisionName
from ...inputs.image import ImageTransform
from ...model.cobra import VisionModel
from ..session import INPUT, OUTPUT
from .exportable import make_exportable

OPSET = 18  # fully supported by TensorRT 10.3 (JetPack 6) and current onnxruntime
EXTERNAL_DATA_ABOVE_BYTES = 1 << 30  # protobuf files are limited to 2 GiB


def feature_name(index: int) -> str:
    """Return the name in the graph of an encoder's features, (1, n_patches, embed_dim) float32; not one of its outputs."""
    return f"encoder_{index}"


class _Graph(nn.Module):
    """The traced module: from the input form to the embeddings, and the encoders' features."""

    def __init__(self, model: VisionModel, transform: ImageTransform) -> None:
        super().__init__()
        self.tower, self.projector = model.tower, model.projector
        self.form, self.n_squares = transform.input, transform.n_squares
        means, deviations = (torch.tensor([getattr(e, what) for e in transform.encoders]) for what in ("mean", "std"))
        self.register_buffer("factor", (1 / (255 * deviations))[:, None, :, None, None])
        self.register_buffer("shift", (-means / deviations)[:, None, :, None, None])

    def forward(self, taken: Tensor) -> tuple[Tensor, ...]:
        encoders: Any = self.tower.encoders
        if self.form == "uint8":
            # TensorRT accepts uint8 only as an input that is cast first.
            values, factor, shift = taken.float().permute(0, 3, 1, 2), self.get_buffer("factor"), self.get_buffer("shift")
            parts = [values[i % self.n_squares][None] * factor[i] + shift[i] for i in range(len(encoders))]
        else:
            parts = list(taken.chunk(len(encoders), dim=1))
        features = [encoder(part) for encoder, part in zip(encoders, parts, strict=True)]
        return self.projector(torch.cat(features, dim=-1)), *features


def export_onnx(model: VisionModel, transform: ImageTransform, file: Path, precision: PrecisionName = "fp32") -> None:
    """Write the graph: INPUT, with shape and dtype of the transform's pixels, to OUTPUT (1, n_visual_tokens, d_model) float32.

    Shapes are static. Weights go to `<file>.data` if they exceed EXTERNAL_DATA_ABOVE_BYTES. The graph is checked with onnx's
    checker.

    Args:
        model: rewritten in place, not usable afterwards.
        transform: defines the input form.
        file: the file to write.
        precision: of the matmuls: "fp32", "fp16" or "bf16".
    """
    make_exportable(model, precision)
    example = torch.zeros(transform.shape, dtype=getattr(torch, transform.input))
    features = [feature_name(i) for i in range(len(transform.encoders))]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # The exporter prints its progress on stdout, which is reserved for --json.
    with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(model, transform).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT, *features],
            verbose=False,
        )
    assert program is not None
    del program.model.graph.outputs[1:]  # were outputs only to be named
    _remove_metadata(program.model)
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    program.save(str(file), external_data=weights_bytes > EXTERNAL_DATA_ABOVE_BYTES)
    del program
    onnx.checker.check_model(str(file))


def _remove_metadata(model: Any) -> None:
    """Remove the exporter's metadata, which contain file paths and make equal exports differ."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
