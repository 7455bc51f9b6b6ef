"""Emulate the rounding of a 16-bit graph on a CPU.

A GPU multiplies 16-bit operands, accumulates in float32 and rounds the sum to 16 bits. onnxruntime on a CPU has no such
matmuls: it runs fp16 graphs in float32 throughout, which is closer to the float model than any device, and rejects bf16. So
parity and drift of 16-bit graphs are measured on an emulated graph: every operation in float32, its 16-bit operands widened,
its results rounded to 16 bits.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ...bundle.manifest import VisionGraph
from ...bundle.reader import VISION
from ...formats.model_config import CobraConfig
from ..session import VisionSession

_SIXTEEN_BITS = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def write_emulated(graph: Path, reference: Path) -> None:
    """Write the emulated graph next to the graph, where its external data is.

    Args:
        graph: an ONNX file with 16-bit operations.
        reference: the emulated graph to write, in the same directory.
    """
    assert graph.parent == reference.parent
    model = onnx.load(str(graph), load_external_data=False)
    types = _types(model)
    nodes: list[onnx.NodeProto] = []
    widened: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "Cast":
            for i, name in enumerate(node.input):
                if types.get(name) in _SIXTEEN_BITS:
                    if name not in widened:
                        widened[name] = f"{name}/float32"
                        nodes.append(helper.make_node("Cast", [name], [widened[name]], to=TensorProto.FLOAT))
                    node.input[i] = widened[name]
        rounded = [o for o in node.output if types.get(o) in _SIXTEEN_BITS and node.op_type != "Cast"]
        for i, name in enumerate(node.output):
            if name in rounded:
                node.output[i] = f"{name}/unrounded"
        nodes.append(node)
        nodes += [helper.make_node("Cast", [f"{name}/unrounded"], [name], to=types[name]) for name in rounded]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # has the original types
    reference.write_bytes(model.SerializeToString())


def open_emulated(file: Path, config: CobraConfig, graph: VisionGraph) -> VisionSession:
    """Open a graph with the rounding of its precision emulated; the emulated file exists only while it is opened.

    Raises:
        BundleError: see `VisionSession`.
    """
    if graph.precision not in ("fp16", "bf16"):
        return VisionSession(file, config, graph.input)
    reference = file.with_name(f"emulated-{VISION}")
    try:
        write_emulated(file, reference)
        session = VisionSession(reference, config, graph.input)
        session.name += f", {graph.precision} emulated"
        return session
    finally:
        reference.unlink(missing_ok=True)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every typed value."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return types | {t.name: t.data_type for t in graph.initializer}
