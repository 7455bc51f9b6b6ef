"""The matmuls with weights in a vision graph: the range of their inputs, and the error of each in int8."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from ...errors import InputError
from ..session import runtime_options

ROWS = 256  # rows of a matmul's input, over all images, on which its error is measured
_TINY = 1e-30


@dataclass(frozen=True)
class Matmul:
    """A MatMul of an activation and a stored weight (in, out): the names of node, input and weight, and a readable label."""

    node: str
    source: str
    weight: str
    label: str


@dataclass(frozen=True, eq=False)
class Measurements:
    """Calibration results.

    Attributes:
        highest: largest input magnitude, by node.
        errors: relative error of the output in int8, by node.
        outputs: the graph's output for each image, (1, n_visual_tokens, d_model) float32.
    """

    highest: dict[str, float]
    errors: dict[str, float]
    outputs: list[np.ndarray]


def weight_matmuls(graph: onnx.GraphProto) -> list[Matmul]:
    """Return every MatMul whose second operand is a stored matrix, labeled by its bias."""
    matrices = {i.name for i in graph.initializer if len(i.dims) == 2}
    vectors = {i.name for i in graph.initializer if len(i.dims) == 1}
    readers = defaultdict[str, list[onnx.NodeProto]](list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    found = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            added = (name for after in readers[node.output[0]] if after.op_type == "Add" for name in after.input)
            # The exporter merges equal biases into one tensor: its name would be that of another matmul.
            bias = [name for name in added if name in vectors and len(readers[name]) == 1]
            label = bias[0].removesuffix(".bias") if bias else node.name
            found.append(Matmul(node.name, node.input[0], node.input[1], label))
    return found


def measure(
    file: Path, matmuls: list[Matmul], pixels: Iterable[np.ndarray], n_images: int, on_step: Callable[[], None]
) -> Measurements:
    """Run the float graph on every image, one in memory at a time, and measure each matmul.

    Args:
        file: the float32 graph.
        matmuls: those of `weight_matmuls`.
        pixels: images, each (n_squares, size, size, 3) uint8 or (1, 3·n_encoders, size, size) float32, as the graph takes them.
        n_images: number of images.
        on_step: called after each image.

    Raises:
        InputError: an input of a matmul is not finite.
    """
    session = _watching(file, matmuls)
    name = session.get_inputs()[0].name
    highest = dict.fromkeys((p.node for p in matmuls), 0.0)
    rows: dict[str, list[np.ndarray]] = {p.node: [] for p in matmuls}
    outputs = list[np.ndarray]()
    for number, image in enumerate(pixels):
        values: Any = session.run(None, {name: image})
        output, *sources = values
        outputs.append(output)
        for matmul, x in zip(matmuls, sources, strict=True):
            flat = x.reshape(-1, x.shape[-1])
            top = float(max(flat.max(), -flat.min()))
            if not np.isfinite(top):
                raise InputError(
                    f"calibration image {number + 1}: the input of {matmul.label} contains NaN or infinity; "
                    "the vision weights are damaged or overflow"
                )
            highest[matmul.node] = max(highest[matmul.node], top)
            rows[matmul.node].append(flat[sampled_rows(len(flat), number, n_images)].copy())
        del sources
        on_step()
    del session
    return Measurements(highest, _errors(file, matmuls, rows, highest), outputs)


def _watching(file: Path, matmuls: list[Matmul]) -> onnxruntime.InferenceSession:
    """Open the graph with the inputs of the matmuls as additional outputs, in order."""
    model = onnx.load(file, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=p.source) for p in matmuls)
    options = runtime_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent.resolve()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _errors(
    file: Path, matmuls: list[Matmul], rows: dict[str, list[np.ndarray]], highest: dict[str, float]
) -> dict[str, float]:
    weights = {i.name: i for i in onnx.load(file, load_external_data=False).graph.initializer}
    errors = {}
    for p in matmuls:
        weight = torch.from_numpy(numpy_helper.to_array(weights[p.weight], str(file.parent)).astype(np.float32))
        errors[p.node] = relative_error(torch.from_numpy(np.concatenate(rows.pop(p.node))), weight, highest[p.node])
    return errors


def sampled_rows(n_rows: int, number: int, n_images: int) -> slice:
    """Return the rows to sample of image `number`: ROWS over all images, evenly spaced, at different positions in each."""
    step = max(1, n_rows * n_images // ROWS)
    return slice(number * 7 % min(step, n_rows), None, step)


def relative_error(x: Tensor, weight: Tensor, highest: float) -> float:
    """Return the relative RMS error of a matmul in int8, compared with float.

    Every row has equal weight: in a ViT a few tokens are a hundred times larger than the rest, and a norm follows.

    Args:
        x: rows (n, in) float32.
        weight: (in, out) float32, rounded with one scale per column.
        highest: the magnitude in x that maps to 127.
    """
    scales = weight.abs().amax(0).clamp_min(_TINY) / 127
    step = max(highest, _TINY) / 127
    exact = x @ weight
    off = ((x / step).round().clamp(-127, 127) * step) @ ((weight / scales).round() * scales) - exact
    return float((off.square().sum(1) / exact.square().sum(1).clamp_min(_TINY)).mean().sqrt())
