"""Static int8 of the vision graph as QDQ, by onnxruntime's quantizer.

Products with weights get int8 on both sides: weights one scale for each output channel, activations one scale each, zero
point 0, chosen on calibration images. All else stays float: patch embedding, norms, softmax, attention's own matmuls, GELU,
biases and the residual stream. It is the form that TensorRT takes as explicit quantization and that onnxruntime fuses into
integer kernels on a CPU. Products that int8 hurts most are left wide until the graph's output is within the goal.
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
WIDE_AT_MOST = 0.125  # of all matmuls: with more the file is no longer about a quarter
_CHECKED = 4  # images on which the finished graph is compared with the float one


@dataclass(frozen=True)
class Wide:
    """A product left float: its label, and the relative error that int8 would give its output."""

    matmul: str
    error: float


@dataclass(frozen=True)
class Int8Report:
    """What became of a graph.

    Attributes:
        quantized: number of matmuls in int8.
        wide: those left float, largest error first.
        relative_rms: largest at the graph's output over the checked images, ‖int8 - float‖ / ‖float‖.
        relative_rms_goal: what it was to stay within; above it where as many as allowed are wide and it was not enough.
        errors: label and relative error of every product, largest first.
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
    """Write the int8 graph.

    Weights go to `<out>.data` when they exceed EXTERNAL_DATA_ABOVE_BYTES. Equal inputs give equal bytes.

    Args:
        float_graph: float32, as `export_onnx` writes it.
        out: where; not the same file.
        pixels: calibration images, each as the graph takes it; read one at a time, those that are checked twice.
        relative_rms_goal: at the graph's output; matmuls are left wide until it is met, or WIDE_AT_MOST of them are.
        on_step: called after each image.

    Raises:
        InputError: no images, nothing to quantize, or activations that are not finite.
    """
    if not len(pixels):
        raise InputError("int8 needs calibration images, got none; give at least one")
    matmuls = weight_matmuls(onnx.load(float_graph, load_external_data=False).graph)
    if not matmuls:
        raise InputError(f"{float_graph}: no product of an activation with a stored matrix, nothing to quantize")
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
        # Shapes are known: without the mark the quantizer would infer them, over two more copies of the weights.
        add_infer_metadata(model)
    quantizer: Any = QDQQuantizer(  # onnxruntime annotates some of its quantizer
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
            # Sums of a whole row are wanted in float: a bias, a GELU or the residual stream comes next.
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
    """Give biases of these matmuls the shape (1, 1, out).

    onnxruntime joins a MatMul and a vector added to it into a Gemm before it looks for integer matmuls, and knows no integer
    Gemm with a float bias: the whole product would run in float, from weights dequantized at every run.
    """
    outputs = {node.output[0] for node in graph.node if node.name in nodes}
    vectors = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 1}
    rows = dict[str, str]()  # an exporter gives equal biases one tensor, which others may read too
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
    """Return the largest relative RMS over up to _CHECKED images, spread evenly."""
    session = open_on_cpu(file)
    chosen = range(0, len(pixels), -(-len(pixels) // _CHECKED))
    worst = 0.0
    for i in chosen:
        output: Any = session.run([OUTPUT], {INPUT: pixels[i]})[0]
        worst = max(worst, relative_rms(output, outputs[i]))
    return worst
