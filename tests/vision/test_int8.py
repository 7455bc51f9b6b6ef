"""int8 of the vision graph: what is written, how onnxruntime fuses it, which matmuls stay wide, and SmoothQuant."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from cobra_edge.errors import InputError
from cobra_edge.inputs.image import ImageTransform, load_image
from cobra_edge.model.checkpoint import open_checkpoint
from cobra_edge.model.cobra import load_vision
from cobra_edge.vision.graph import int8, smoothquant
from cobra_edge.vision.graph.int8 import quantize_int8
from cobra_edge.vision.graph.matmuls import ROWS, relative_error, sampled_rows, weight_matmuls
from cobra_edge.vision.graph.onnx_export import export_onnx
from cobra_edge.vision.graph.parity import relative_rms
from cobra_edge.vision.graph.smoothquant import apply_smoothquant, smoothquant_scales

from ..conftest import MINI
from ..tolerance import assert_close

OUTLIER = "tower.encoders.1.vit.blocks.2.mlp.fc2"


@pytest.fixture(scope="module")
def mini():
    return open_checkpoint("mini")


@pytest.fixture(scope="module")
def pixels(mini):
    files = sorted((MINI / "calibration").iterdir())[::8]
    return [ImageTransform.of(mini.config).pixels(load_image(f)) for f in files]


@pytest.fixture(scope="module")
def model(mini):
    return load_vision(mini)


@pytest.fixture(scope="module")
def float_graph(mini, model, tmp_path_factory):
    file = tmp_path_factory.mktemp("float") / "vision.onnx"
    export_onnx(copy.deepcopy(model), ImageTransform.of(mini.config), file)
    return file


@pytest.fixture(scope="module")
def quantized(float_graph, pixels, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "vision.onnx"
    return out, quantize_int8(float_graph, out, pixels)


def run(file, x, *outputs):
    """Return the graph's output, or the named values of it, without any optimization."""
    proto = onnx.load(file)
    del proto.graph.output[len(proto.graph.output) if not outputs else 0 :]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def initializers(file):
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(file).graph.initializer}


def node_that_makes(graph, name):
    return next(node for node in graph.node if name in node.output)


def tower_matmuls(file):
    return [p for p in weight_matmuls(onnx.load(file).graph) if p.label.startswith("tower.")]


def projector_weights(file):
    found = [p.weight for p in weight_matmuls(onnx.load(file).graph) if p.label.startswith("projector.")]
    assert len(found) == 3
    return found


def with_outlier(float_graph, file, by=300.0):
    """Write the graph with one large channel in the input of OUTLIER."""
    proto = onnx.load(float_graph)
    bias = next(i for i in proto.graph.initializer if i.name == OUTLIER.replace("fc2", "fc1.bias"))
    value = numpy_helper.to_array(bias).copy()
    value[3] += by
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))
    onnx.save(proto, file)
    return file


def test_a_product_multiplies_rounded_values(float_graph, quantized, pixels):
    graph, values, weights = onnx.load(quantized[0]).graph, initializers(quantized[0]), initializers(float_graph)
    for matmul in tower_matmuls(float_graph)[::6]:
        node = next(n for n in graph.node if n.name == matmul.node)
        from_x, from_w = (node_that_makes(graph, name) for name in node.input)
        to_x = node_that_makes(graph, from_x.input[0])
        assert (to_x.op_type, from_x.op_type, from_w.op_type) == ("QuantizeLinear", "DequantizeLinear", "DequantizeLinear")
        step, scales, codes = values[to_x.input[1]], values[from_w.input[1]], values[from_w.input[0]]
        weight = weights[matmul.weight]
        highest = max(float(np.abs(run(float_graph, p, matmul.source)[0]).max()) for p in pixels)
        np.testing.assert_allclose(step, highest / 127, rtol=1e-4)
        np.testing.assert_allclose(scales, np.abs(weight).max(0) / 127, rtol=1e-6)
        assert codes.dtype == np.int8 and (np.abs(codes - weight / scales) <= 0.5001).all()
        x, got = run(quantized[0], pixels[1], matmul.source, node.output[0])
        rounded = np.clip(np.rint(x.astype(np.float64) / step), -128, 127) * step
        assert_close(got, rounded @ (codes * scales.astype(np.float64)), "product")


def test_the_form_is_what_tensorrt_takes(float_graph, quantized):
    before, after = onnx.load(float_graph), onnx.load(quantized[0])
    values, matmuls = initializers(quantized[0]), tower_matmuls(float_graph)
    assert after.opset_import == before.opset_import and {n.domain for n in after.graph.node} == {""}
    zeros = [values[n.input[2]] for n in after.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(zeros) == 3 * len(matmuls) and all(z.dtype == np.int8 and not z.any() for z in zeros)
    shapes = sorted(v.shape for v in values.values() if v.dtype == np.int8 and v.ndim == 2)
    assert shapes == sorted(initializers(float_graph)[p.weight].shape for p in matmuls)
    biases = [v for name, v in values.items() if name.endswith("bias_row")]
    assert len(biases) == len(matmuls) and all(v.dtype == np.float32 for v in biases)
    assert before.graph.input == after.graph.input and before.graph.output == after.graph.output


def test_the_projector_stays_float(float_graph, quantized):
    before, after = initializers(float_graph), initializers(quantized[0])
    for weight in projector_weights(float_graph):
        assert after[weight].dtype == np.float32 and (after[weight] == before[weight]).all()


def test_every_product_becomes_an_integer_kernel(quantized, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(quantized[0], options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert found.count("MatMulIntegerToFloat") == quantized[1].quantized
    assert found.count("Gemm") + found.count("FusedGemm") == 3  # of the projector
    assert not {"MatMulNBits", "DequantizeLinear"} & set(found)


def test_it_stays_near_the_float_graph(float_graph, quantized, pixels):
    report = quantized[1]
    assert report.quantized == 32 and report.wide == () and report.relative_rms <= 0.013
    far = [relative_rms(run(quantized[0], p)[0], run(float_graph, p)[0]) for p in pixels]
    assert 1e-3 < max(far) <= 0.013
    assert [e for _, e in report.errors] == sorted((e for _, e in report.errors), reverse=True)


def test_the_tower_is_small(float_graph, quantized):
    # cobra-mini's patch embedding and positions, which stay float, are a ninth of it; of a full-size tower they are 0.1 %.
    projector = sum(v.nbytes for n, v in initializers(float_graph).items() if n in projector_weights(float_graph))
    assert quantized[0].stat().st_size - projector < 0.35 * (float_graph.stat().st_size - projector)


def test_equal_inputs_give_equal_bytes_that_tell_nothing(float_graph, quantized, pixels, tmp_path):
    quantize_int8(float_graph, tmp_path / "again.onnx", pixels)
    data = (tmp_path / "again.onnx").read_bytes()
    assert data == quantized[0].read_bytes()
    assert not any(word in data for word in (str(tmp_path).encode(), str(float_graph.parent).encode(), b"site-packages"))
    assert [f.name for f in tmp_path.iterdir()] == ["again.onnx"]


def test_large_graphs_keep_their_weights_beside_them(float_graph, quantized, pixels, tmp_path, monkeypatch):
    large = tmp_path / "large.onnx"
    onnx.save_model(onnx.load(float_graph), large, save_as_external_data=True, location="large.onnx.data")
    monkeypatch.setattr(int8, "EXTERNAL_DATA_ABOVE_BYTES", 1 << 20)
    out = tmp_path / "out" / "vision.onnx"
    out.parent.mkdir()
    for _ in range(2):  # over what an earlier run left
        quantize_int8(large, out, pixels)
        assert sorted(f.name for f in out.parent.iterdir()) == ["vision.onnx", "vision.onnx.data"]
        assert out.stat().st_size < 400_000 and (out.parent / "vision.onnx.data").stat().st_size < 5_000_000
    kept = {
        e.value
        for i in onnx.load(out, load_external_data=False).graph.initializer
        for e in i.external_data
        if e.key == "location"
    }
    assert kept == {"vision.onnx.data"}
    assert (run(out, pixels[0])[0] == run(quantized[0], pixels[0])[0]).all()


def test_the_product_with_an_outlier_is_left_wide(float_graph, pixels, tmp_path):
    graph = with_outlier(float_graph, tmp_path / "float.onnx")
    all_int8 = quantize_int8(graph, tmp_path / "int8.onnx", pixels, relative_rms_goal=9.0)
    assert all_int8.wide == () and all_int8.errors[0][0] == OUTLIER
    steps = []
    report = quantize_int8(graph, tmp_path / "wide.onnx", pixels, relative_rms_goal=0.02, on_step=lambda: steps.append(1))
    assert [w.matmul for w in report.wide] == [OUTLIER] and report.wide[0].error == all_int8.errors[0][1]
    assert report.relative_rms <= 0.02 < all_int8.relative_rms and report.quantized == 31
    kept = initializers(tmp_path / "wide.onnx")
    assert f"{OUTLIER}.bias" in kept and f"{OUTLIER}.bias_row" not in kept and len(steps) == len(pixels)


def test_a_bias_that_others_read_too_stays_what_it_was_for_them(float_graph, pixels, tmp_path):
    proto, norm = onnx.load(float_graph), "tower.encoders.0.vit.blocks.1.norm2.bias"
    proj = norm.replace("norm2", "attn.proj")
    for node in proto.graph.node:
        node.input[:] = [norm if name == proj else name for name in node.input]
    proto.graph.initializer.remove(next(i for i in proto.graph.initializer if i.name == proj))
    onnx.save(proto, tmp_path / "shared.onnx")
    report = quantize_int8(tmp_path / "shared.onnx", tmp_path / "int8.onnx", pixels)
    values = initializers(tmp_path / "int8.onnx")
    assert values[norm].shape == (128,) and (values[f"{norm}_row"] == values[norm]).all()
    assert report.relative_rms < 0.02 and proj.removesuffix(".bias") not in dict(report.errors)
    assert len(dict(report.errors)) == 32


def test_no_more_are_left_wide_than_allowed(float_graph, pixels, tmp_path):
    report = quantize_int8(float_graph, tmp_path / "int8.onnx", pixels, relative_rms_goal=1e-6)
    assert len(report.wide) == int(32 * int8.WIDE_AT_MOST) and report.relative_rms > report.relative_rms_goal
    assert [w.matmul for w in report.wide] == [name for name, _ in report.errors[: len(report.wide)]]


def test_relative_error_against_loops():
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((3, 40)), random.standard_normal((40, 5))
    x[2] *= 50
    step, total = np.abs(x).max() / 127, 0.0
    for row in x:
        exact, rounded = row @ weight, np.zeros(5)
        for column in range(5):
            scale = np.abs(weight[:, column]).max() / 127
            for a, w in zip(row, weight[:, column], strict=True):
                rounded[column] += round(a / step) * step * round(w / scale) * scale
        total += np.sum((rounded - exact) ** 2) / np.sum(exact**2)
    got = relative_error(torch.tensor(x).float(), torch.tensor(weight).float(), float(np.abs(x).max()))
    assert got == pytest.approx(np.sqrt(total / 3), rel=1e-3)
    assert got > 0.2  # the small rows count as much as the large one


@pytest.mark.parametrize(("n_rows", "n_images"), [(1, 1), (1, 63), (64, 40), (69, 1), (729, 1), (729, 63), (729, 5000)])
def test_kept_rows_are_about_as_many_as_wanted(n_rows, n_images):
    counts = [len(range(n_rows)[sampled_rows(n_rows, number, n_images)]) for number in range(n_images)]
    assert min(counts) >= 1 and sum(counts) <= 2 * max(ROWS, n_images)


def add_outliers(model, factor):
    """Scale up two output channels of each norm, and divide the columns that read them: the function stays the same."""
    torch.manual_seed(1)
    for block in (b for b in model.modules() if hasattr(b, "norm1")):
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            chosen = torch.randperm(len(norm.weight))[:2]
            norm.weight.data[chosen] *= factor
            norm.bias.data[chosen] *= factor
            linear.weight.data[:, chosen] /= factor
    return model


@torch.inference_mode()
def test_smoothquant_keeps_the_function_and_removes_outliers(mini, pixels, tmp_path):
    with_outliers = add_outliers(load_vision(mini), 60)
    smoothed = copy.deepcopy(with_outliers)
    apply_smoothquant(smoothed, pixels)
    x = torch.from_numpy(pixels[0])
    assert_close(smoothed(x).numpy(), with_outliers(x).numpy(), "vision")
    far = []
    for name, each in (("with_outliers", with_outliers), ("smoothed", smoothed)):
        export_onnx(copy.deepcopy(each), ImageTransform.of(mini.config), tmp_path / f"{name}.onnx")
        far.append(quantize_int8(tmp_path / f"{name}.onnx", tmp_path / "int8.onnx", pixels, relative_rms_goal=9.0).relative_rms)
    assert far[0] > 0.1 and far[1] < 0.02


def test_smoothquant_scales_are_those_of_the_paper():
    highest, weight = torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([[1.0, -4.0, 2.0, 0.0], [0.5, 1.0, 1.0, 0.0]])
    np.testing.assert_allclose(smoothquant_scales(highest, weight, 0.5), [2.0, 1.5, 1.0, 1.0])


def test_a_tower_that_gains_nothing_is_left_alone(model, pixels, monkeypatch):
    monkeypatch.setattr(smoothquant, "PAYS_BELOW", 0.0)
    left = copy.deepcopy(model)
    apply_smoothquant(left, pixels[:1])
    assert all((v == left.state_dict()[k]).all() for k, v in model.state_dict().items())


@pytest.mark.parametrize("refuse", [lambda g, m, d: quantize_int8(g, d / "x", []), lambda g, m, d: apply_smoothquant(m, [])])
def test_no_calibration_images_are_refused(refuse, float_graph, model, tmp_path):
    with pytest.raises(InputError, match="needs calibration images, got none; give at least one"):
        refuse(float_graph, model, tmp_path)


def test_activations_that_are_not_finite_are_refused(float_graph, model, pixels, tmp_path):
    bad = np.full_like(pixels[0], np.nan)
    with pytest.raises(
        InputError, match=r"image 2: the input of tower.encoders.0.vit.blocks.0.attn.qkv contains NaN or infinity"
    ):
        quantize_int8(float_graph, tmp_path / "x.onnx", [pixels[0], bad])
    with pytest.raises(InputError, match=r"blocks.0.attn.qkv: its input contains NaN or infinity"):
        apply_smoothquant(model, [pixels[0], bad])
    assert not list(tmp_path.iterdir())


def test_a_graph_without_matmuls_is_refused(pixels, tmp_path):
    value = onnx.helper.make_tensor_value_info
    x, y = (value(name, onnx.TensorProto.FLOAT, pixels[0].shape) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "none", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "none.onnx")
    with pytest.raises(InputError, match="nothing to quantize"):
        quantize_int8(tmp_path / "none.onnx", tmp_path / "x.onnx", pixels)
