"""Static int8 quantization of the vision graph as QDQ, by onnxruntime's quantizer.

The tower's matmuls with weights get int8 operands: weights with one scale per output channel, activations with one scale per
tensor, zero point 0, chosen on calibration images. Everything else stays float: patch embedding, norms, softmax, the matmuls
of attention, GELU, biases, the residual stream, and the projector: nothing after it averages its errors out, and its three
matmuls made half of the squared error at 6 % of the operations. TensorRT reads this as explicit quantization, and onnxruntime
fuses it into integer kernels on a CPU. The matmuls with the largest int8 error stay float too ("wide") until the error of the
graph's output is within the goal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.quant_utils import add_infer_metadata

from ...errors import InputError
from ..session import INPUT, OUTPUT, open_on_cpu
from .matmuls import Matmul, Measurements, measure, weight_matmuls
from .onnx_export import EXTERNAL_DATA_ABOVE_BYTES
from .parity import relative_rms

RELATIVE_RMS_GOAL = 0.05
WIDE_AT_MOST = 0.125  # of the tower's matmuls: with more, the file would be much larger than a quarter
_PROJECTOR = "projector."  # beginning of the labels of its matmuls
_CHECKED = 4  # images on which the finished graph is compared with the float graph


@dataclass(frozen=True)
class Wide:
    """A matmul left float: its label, and the relative error that int8 would cause in its output."""

    matmul: str
    error: float


@dataclass(frozen=True)
class Int8Report:
    """Result of the quantization.

    Attributes:
        quantized: number of matmuls in int8.
        wide: matmuls of the tower left float, largest error first.
        relative_rms: error of the graph's output, ‖int8 - float‖ / ‖float‖, the largest over the checked images.
        relative_rms_goal: its target; exceeded if the allowed number of wide matmuls does not suffice.
        errors: label and relative error of every matmul of the tower, largest first.
    """

    quantized: int
    wide: tuple[Wide, ...]
    relative_rms: float
    relative_rms_goal: float
    errors: tuple[tuple[str, float], ...]


def quantize_int8(
    float_graph: Path,
    out: Path,
    pixels: Sequence[np.ndarray],
    *,
    relative_rms_goal: float = RELATIVE_RMS_GOAL,
    on_step: Callable[[], None] = lambda: None,
) -> Int8Report:
    """Quantize a graph to int8 and write it.

    Weights go to `<out>.data` if they exceed EXTERNAL_DATA_ABOVE_BYTES. The output is deterministic.

    Args:
        float_graph: the float32 graph, as written by `export_onnx`.
        out: the file to write; not `float_graph`.
        pixels: calibration images, each (n_squares, size, size, 3) uint8 or (1, 3·n_encoders, size, size) float32, as the graph
            takes them; read one at a time, the checked ones twice.
        relative_rms_goal: target error of the graph's output; up to WIDE_AT_MOST of the matmuls are left wide to meet it.
        on_step: called after each image.

    Raises:
        InputError: no images, nothing to quantize, or activations that are not finite.
    """
    if not len(pixels):
        raise InputError("int8 needs calibration images, got none; give at least one")
    stored = weight_matmuls(onnx.load(float_graph, load_external_data=False).graph)
    matmuls = [p for p in stored if not p.label.startswith(_PROJECTOR)]
    if not matmuls:
        raise InputError(f"{float_graph}: no matmul of a tower with a stored weight, nothing to quantize")
    found = measure(float_graph, matmuls, pixels, len(pixels), on_step)
    ranked = sorted(matmuls, key=lambda p: (-found.errors[p.node], p.node))
    most, wide = int(len(matmuls) * WIDE_AT_MOST), 0
    while True:
        _write(_quantized(float_graph, ranked[wide:], found), out)
        rms = _distance(out, pixels, found.outputs)
        if rms <= relative_rms_goal or wide == most:
            break
        wide = min(most, 2 * wide or max(1, most // 8))
    errors = tuple((p.label, found.errors[p.node]) for p in ranked)
    return Int8Report(len(matmuls) - wide, tuple(Wide(*e) for e in errors[:wide]), rms, relative_rms_goal, errors)


def _quantized(file: Path, matmuls: Sequence[Matmul], found: Measurements) -> onnx.ModelProto:
    """Return the graph with the matmuls in int8."""
    highest = {p.source: np.float32(found.highest[p.node]) for p in matmuls}
    ranges = TensorsData(CalibrationMethod.MinMax, {name: (-top, top) for name, top in highest.items()})
    model = onnx.load(file)
    if highest.keys() <= {value.name for value in model.graph.value_info}:
        # Shapes are known. Without this marker the quantizer would infer them, with two more copies of the weights.
        add_infer_metadata(model)
    quantizer: Any = QDQQuantizer(  # only partly annotated
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=[p.node for p in matmuls],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            # The output stays float: a bias, a GELU or the residual stream comes next.
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    model = quantizer.model.model
    _prevent_gemm_fusion(model.graph, {p.node for p in matmuls})
    del model.metadata_props[:]
    return model


def _prevent_gemm_fusion(graph: onnx.GraphProto, nodes: set[str]) -> None:
    """Reshape biases of these matmuls to (1, 1, out).

    onnxruntime fuses a MatMul and an added vector into a Gemm before it looks for integer matmuls, and has no integer Gemm with
    a float bias: the matmul would run in float, with weights dequantized in every run.
    """
    outputs = {node.output[0] for node in graph.node if node.name in nodes}
    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    rows = dict[str, str]()  # the exporter merges equal biases into one tensor, which other nodes may read too
    for node in graph.node:
        if node.op_type != "Add" or not outputs & set(node.input):
            continue
        for index, name in enumerate(node.input):
            if name in vectors:
                rows[name] = node.input[index] = f"{name}_row"
    read = {name for node in graph.node for name in node.input}
    for name, row in rows.items():
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(vectors[name])[None, None], row))
        if name not in read:
            graph.initializer.remove(vectors[name])


def _write(model: onnx.ModelProto, out: Path) -> None:
    data = out.with_name(out.name + ".data")
    data.unlink(missing_ok=True)  # onnx would append to it
    external = model.ByteSize() > EXTERNAL_DATA_ABOVE_BYTES
    onnx.save_model(model, out, save_as_external_data=external, location=data.name)
    onnx.checker.check_model(str(out))


def _distance(file: Path, pixels: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> float:
    """Return the largest relative RMS error over up to _CHECKED images, evenly spaced."""
    session = open_on_cpu(file)
    chosen = range(0, len(pixels), -(-len(pixels) // _CHECKED))
    worst = 0.0
    for i in chosen:
        output: Any = session.run([OUTPUT], {INPUT: pixels[i]})[0]
        worst = max(worst, relative_rms(output, outputs[i]))
    return worst
