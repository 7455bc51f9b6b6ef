"""Untrusted vision.onnx: only plain arithmetic on tensors listed in the manifest."""

import shutil

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobra_edge.bundle.reader import VISION, Bundle
from cobra_edge.errors import BundleError, MachineError
from cobra_edge.formats.onnx_file import OPERATORS, require_plain_graph
from cobra_edge.inputs.image import ImageTransform
from cobra_edge.run import command
from cobra_edge.terminal.output import run_command
from cobra_edge.vision.graph import onnx_export
from cobra_edge.vision.graph.onnx_export import export_onnx
from cobra_edge.vision.runtimes import open_vision
from cobra_edge.vision.session import VisionSession

from ..bundle.test_reader import rehash
from ..conftest import MINI
from ..model.test_vision import MINI as ENCODERS
from ..model.test_vision import small

ROWS, WIDTH = 64, 256  # of cobra-mini
SHAPE = [1, 112, 112, 3]


def plain(*nodes, initializers=(), rows=ROWS, **fields):
    """Return a model with cobra-mini's input and output, which returns zeros plus `extra`, if the nodes write it."""
    zeros = numpy_helper.from_array(np.zeros((1, ROWS, WIDTH), np.float32), "zeros")
    own = nodes or (helper.make_node("Identity", ["zeros"], ["embeddings"]),)
    ends = [
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, SHAPE)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, rows, WIDTH])],
    ]
    graph = helper.make_graph(list(own), "g", *ends, [zeros, *initializers])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, **fields)


def flaw_of(tmp_path, model, data_files=None):
    file = tmp_path / "vision.onnx"
    file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(BundleError) as caught:
        require_plain_graph(file, data_files or {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "encoders", "size", "precision", "form"),
    [
        ("linear", ENCODERS.encoders[:1], 112, "fp32", "float32"),
        ("gelu-mlp", ENCODERS.encoders[1:], 112, "fp16", "uint8"),
        ("fused-gelu-mlp", ENCODERS.encoders, 112, "bf16", "uint8"),
        ("fused-ldpnet", ENCODERS.encoders, 224, "fp32", "uint8"),
        ("fused-ldpnet", ENCODERS.encoders, 378, "fp32", "float32"),  # 27 patches per side, as published
    ],
)
def test_what_exports_write_is_plain(tmp_path, monkeypatch, kind, encoders, size, precision, form):
    model, config = small(kind, encoders, size)
    file = tmp_path / "vision.onnx"
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_ABOVE_BYTES", 0 if precision == "bf16" else 1 << 30)
    export_onnx(model, ImageTransform.of(config, form), file, precision)
    data = {f.name: f.stat().st_size for f in tmp_path.iterdir() if f != file}
    assert bool(data) == (precision == "bf16")
    require_plain_graph(file, data)


@pytest.mark.parametrize("options", [{}, {"vision_precision": "int8"}])
def test_graphs_of_bundles_are_plain(mini_bundle, options):
    bundle = Bundle.open(mini_bundle("w4a16-g128", **options))
    assert bundle.graph_file() == bundle.path(VISION)


def test_the_smallest_graph_is_plain(tmp_path):
    (tmp_path / "a.onnx").write_bytes(plain().SerializeToString())
    require_plain_graph(tmp_path / "a.onnx", {})


def loop():
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info(n, t, []) for n, t in (("i", 7), ("go", 9), ("x", 1))],
        [helper.make_tensor_value_info(n, t, []) for n, t in (("go_on", 9), ("y", 1))],
    )
    return helper.make_node("Loop", ["", "true", "zeros"], ["embeddings"], body=body)


def domestic(operator, **attributes):
    return plain(helper.make_node(operator, ["zeros"], ["embeddings"], **attributes))


def test_control_flow_functions_and_other_domains_are_refused(tmp_path):
    true = numpy_helper.from_array(np.array(True), "true")
    assert "the operator 'Loop'" in flaw_of(tmp_path, plain(loop(), initializers=[true]))
    for name in ("If", "Scan", "SequenceMap", "RandomNormal", "ConstantOfShape", "Tile", "NoSuchOperator", "StringConcat"):
        assert name not in OPERATORS and f"the operator {name!r}" in flaw_of(tmp_path, domestic(name))
    custom = plain(helper.make_node("Add", ["zeros", "zeros"], ["embeddings"], domain="com.microsoft"))
    assert "the domain 'com.microsoft'" in flaw_of(tmp_path, custom)
    hidden = plain(helper.make_node("Identity", ["zeros"], ["embeddings"], body=loop().attribute[0].g))
    assert "attribute of Identity has a field 6" in flaw_of(tmp_path, hidden)
    body = [helper.make_node("Neg", ["a"], ["b"])]
    function = helper.make_function("own", "Add", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
    assert "a model has a field 25" in flaw_of(tmp_path, plain(functions=[function]))


def external(name="w", dims=(ROWS,), kind=TensorProto.FLOAT, **place):
    tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


LISTED = {"vision.onnx.data": 1000}


def test_external_data_lies_inside_a_listed_file(tmp_path):
    (tmp_path / "vision.onnx").write_bytes(
        plain(initializers=[external(location="vision.onnx.data", offset=744, length=256)]).SerializeToString()
    )
    require_plain_graph(tmp_path / "vision.onnx", LISTED)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"location": "other.bin", "offset": 0, "length": 256}, "is in 'other.bin', which the manifest does not list"),
        ({"location": "../vision.onnx.data", "length": 256}, "does not list"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 140737488355328, "length": 256}, "does not list"),
        ({"offset": 0, "length": 256}, "does not list"),
        ({"location": "vision.onnx.data", "offset": 745, "length": 256}, "which has 1000"),
        ({"location": "vision.onnx.data", "offset": 0, "length": 252}, "expected 256"),
        ({"location": "vision.onnx.data", "offset": -4, "length": 256}, "no offset and length"),
        ({"location": "vision.onnx.data", "offset": "9" * 40, "length": 256}, "no offset and length"),
        ({"location": "vision.onnx.data", "offset": "٣", "length": 256}, "no offset and length"),
        ({"location": "vision.onnx.data", "offset": 0}, "no offset and length"),
    ],
)
def test_external_data_anywhere_else_is_refused(tmp_path, place, says):
    assert says in flaw_of(tmp_path, plain(initializers=[external(**place)]), LISTED)
    in_a_node = helper.make_node("Constant", [], ["embeddings"], value=external(**place))
    assert says in flaw_of(tmp_path, plain(in_a_node), LISTED)


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(name="w", dims=[1 << 40], data_type=TensorProto.FLOAT),
        TensorProto(name="w", dims=[1 << 20, 1 << 20], data_type=TensorProto.FLOAT, raw_data=b"abcd"),
        TensorProto(name="w", dims=[-1], data_type=TensorProto.FLOAT, raw_data=b"abcd"),
        TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, float_data=[1.0]),
        TensorProto(name="w", dims=[9], data_type=TensorProto.INT64, int64_data=[1, -1]),
        TensorProto(name="w", dims=[1], data_type=TensorProto.STRING, string_data=[b"a"]),
        TensorProto(name="w", dims=[1], data_type=99, raw_data=b"abcd"),
        TensorProto(name="w" * 5000, dims=[1], data_type=TensorProto.FLOAT, raw_data=b"abcd"),
    ],
    ids=["huge", "huge of two", "negative", "too few", "too few packed", "text", "unknown", "a long name"],
)
def test_a_tensor_that_is_not_of_the_size_it_says_is_refused(tmp_path, tensor):
    flaw_of(tmp_path, plain(initializers=[tensor]))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.bool_, np.float16])
@pytest.mark.parametrize("raw", [False, True])
def test_tensors_are_counted_however_they_are_stored(tmp_path, kind, raw):
    values = np.array([[0, 1, 100], [3, 1, 1]]).astype(kind)
    stored = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    content = values.tobytes() if raw else values.ravel().tolist()
    tensor = helper.make_tensor("w", stored, values.shape, content, raw)
    (tmp_path / "a.onnx").write_bytes(plain(initializers=[tensor]).SerializeToString())
    require_plain_graph(tmp_path / "a.onnx", {})


def test_a_window_without_bound_is_refused(tmp_path):
    model = plain(helper.make_node("AveragePool", ["zeros"], ["embeddings"], kernel_shape=[1, 1], pads=[0, 0, 1 << 40, 0]))
    assert "a kernel, stride or pad of more than" in flaw_of(tmp_path, model)


def test_ends_have_fixed_sizes(tmp_path):
    for dims in (["rows", 4], [0], [1 << 40], None):
        model = plain()
        del model.graph.output[:]
        model.graph.output.append(helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, dims))
        assert "its output" in flaw_of(tmp_path, model)
    model.graph.output.append(model.graph.output[0])
    assert "2 outputs, expected one" in flaw_of(tmp_path, model)


def test_what_is_no_onnx_is_refused(tmp_path):
    whole = plain().SerializeToString()
    doubled = whole + whole  # protobuf would merge the two
    for content in (b"", b"no graph", b"\xff" * 100, whole[:-1], whole[: len(whole) // 2], doubled, whole + b"\xa2\x06\x01x"):
        flaw_of(tmp_path, content)
    flaw_of(tmp_path, b"\x42\x00" * 4_000_001)  # many empty fields


def test_mutations_are_refused_or_plain(tmp_path):
    whole = bytearray(plain(initializers=[external(location="vision.onnx.data", offset=4, length=256)]).SerializeToString())
    rng, file = np.random.default_rng(0), tmp_path / "vision.onnx"
    head = [*range(60), *range(len(whole) - 400, len(whole))]  # not the content of a tensor
    for _ in range(1500):
        mutated = bytearray(whole)
        for at in rng.choice(head, rng.integers(1, 4)):
            mutated[at] = rng.integers(256)
        file.write_bytes(mutated)
        try:
            require_plain_graph(file, LISTED)
        except BundleError:
            continue


@pytest.fixture
def bundle(mini_bundle, tmp_path):
    return shutil.copytree(mini_bundle("w4a16-g128"), tmp_path / "bundle")


def put(bundle, model):
    (bundle / VISION).write_bytes(model.SerializeToString())
    rehash(bundle, VISION)


def cut_by_the_image(part=1):
    """Return a graph with as many output rows as the first pixel says: its declared shape is wrong only at run time."""
    constants = {"first": [0], "end": [1], "flat": [-1], "axes": [1], "part": [part]}
    nodes = [
        helper.make_node("Reshape", ["pixels", "flat"], ["bytes"]),
        helper.make_node("Slice", ["bytes", "first", "end"], ["byte"]),
        helper.make_node("Cast", ["byte"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Div", ["whole", "part"], ["rows"]),
        helper.make_node("Slice", ["zeros", "first", "rows", "axes"], ["embeddings"]),
    ]
    return plain(*nodes, initializers=[numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items()])


def picked_by_the_image():
    """Return a graph that gathers rows by the first pixels, and fails if there are no such rows."""
    constants = {"flat": [-1], "first": [0], "end": [ROWS]}
    nodes = [
        helper.make_node("Reshape", ["pixels", "flat"], ["bytes"]),
        helper.make_node("Slice", ["bytes", "first", "end"], ["some"]),
        helper.make_node("Cast", ["some"], ["rows"], to=TensorProto.INT64),
        helper.make_node("Gather", ["zeros", "rows"], ["embeddings"], axis=1),
    ]
    return plain(*nodes, initializers=[numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items()])


def test_other_rows_than_declared_are_refused_when_they_come(bundle):
    put(bundle, cut_by_the_image())
    runner = open_vision(Bundle.open(bundle), "cpu")
    assert runner.embed(np.full(SHAPE, ROWS, np.uint8)).shape == (ROWS, WIDTH)
    with pytest.raises(BundleError, match=r"the graph returned \(1, 3, 256\) float32, expected \(1, 64, 256\) float32"):
        runner.embed(np.full(SHAPE, 3, np.uint8))


def test_a_graph_that_fails_while_it_runs_is_a_fault_of_the_bundle(bundle):
    put(bundle, picked_by_the_image())
    runner = open_vision(Bundle.open(bundle), "cpu")
    assert runner.embed(np.full(SHAPE, 3, np.uint8)).shape == (ROWS, WIDTH)
    with pytest.raises(BundleError, match=r"onnxruntime cannot run it; export the bundle again \("):
        runner.embed(np.full(SHAPE, 200, np.uint8))


def test_memory_that_lacks_is_no_fault_of_the_bundle(bundle):
    opened = Bundle.open(bundle)
    runner = VisionSession(opened.path(VISION), opened.manifest.model, "uint8")

    class Full:
        def run(self, *_):
            raise RuntimeError("bad allocation")

    runner._session = Full()
    with pytest.raises(MachineError, match="no memory to run"):
        runner.embed(np.zeros(SHAPE, np.uint8))


@pytest.mark.parametrize("fault", ["loop", "unlisted", "rows", "fails"])
def test_a_bundle_with_such_a_graph_ends_with_exit_code_2(bundle, capsys, fault):
    np.ones(ROWS * WIDTH, np.float32).tofile(bundle / "other.bin")
    unlisted = external(location="other.bin", offset=0, length=4 * ROWS * WIDTH, dims=(1, ROWS, WIDTH))
    models = {
        "loop": lambda: plain(loop(), initializers=[numpy_helper.from_array(np.array(True), "true")]),
        "unlisted": lambda: plain(helper.make_node("Add", ["zeros", "w"], ["embeddings"]), initializers=[unlisted]),
        "rows": lambda: cut_by_the_image(16),
        "fails": picked_by_the_image,
    }
    put(bundle, models[fault]())
    assert run_command(command, [str(bundle), "--image", str(MINI / "demo.png"), "--prompt", "Hi", "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert "error" in shown.lower() and "unexpected" not in shown and "vision.onnx" in shown
