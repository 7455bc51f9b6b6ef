"""The written graph against torch: patterns that runtimes fuse, emulated 16-bit rounding, both input forms."""

import copy
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from cobra_edge.errors import BundleError, InputError
from cobra_edge.formats.model_config import CobraConfig, MambaConfig, VisionConfig, ldpnet_grid
from cobra_edge.formats.precision import precision_named
from cobra_edge.formats.targets import target_named, why_not_precision
from cobra_edge.inputs.image import ImageTransform, load_image
from cobra_edge.model.backbones import VISION_BACKBONES
from cobra_edge.vision.graph import exportable, smoothquant
from cobra_edge.vision.graph.emulation import write_emulated
from cobra_edge.vision.graph.exportable import make_exportable
from cobra_edge.vision.graph.onnx_export import export_onnx
from cobra_edge.vision.graph.parity import ParityError, measure_parity, reference, relative_rms, require_parity
from cobra_edge.vision.session import VisionSession

from ..model.test_vision import MINI, small
from ..tolerance import assert_close

HELDOUT = Path(__file__).parents[2] / "cobra_edge" / "mini" / "heldout"
NOISE = np.random.default_rng(0)


@torch.inference_mode()
def run(model, pixels):
    return model(torch.from_numpy(pixels))[0].numpy()


def random_pixels(config):
    return NOISE.standard_normal(ImageTransform.of(config).shape, np.float32)


def loud(model):
    """Set some channels of the residual stream, and layer scales, to values of a trained DINOv2."""
    with torch.no_grad():
        for encoder in model.tower.encoders:
            for block in encoder.vit.blocks:
                for scale in (block.ls1, block.ls2):
                    if not isinstance(scale, torch.nn.Identity):
                        scale.gamma.copy_(torch.rand_like(scale.gamma))
            encoder.vit.patch_embed.proj.bias[3] += 300
    return model


@pytest.mark.parametrize(
    ("kind", "encoders", "size"),
    [
        ("linear", MINI.encoders[:1], 112),
        ("gelu-mlp", MINI.encoders[1:], 112),
        ("fused-gelu-mlp", MINI.encoders, 112),
        ("fused-ldpnet", MINI.encoders, 224),  # a grid of 16 patches per side, pooled to 14
        ("fused-ldpnet", MINI.encoders, 112),  # of 8, pooled to 4
    ],
)
def test_the_graph_computes_what_torch_does(tmp_path, kind, encoders, size):
    model, config = small(kind, encoders, size)
    file, pixels = tmp_path / "vision.onnx", random_pixels(config)
    expected = reference(loud(model), pixels)
    export_onnx(model, ImageTransform.of(config), file)
    parity = measure_parity(file, "fp32", [pixels], [expected])
    assert list(parity) == [*(f"encoder {i}" for i in range(len(encoders))), "projector"]
    assert max(parity.values()) < 1e-5
    assert_close(VisionSession(file, config).embed(pixels), expected.embeddings, "onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["vision.onnx"]
    assert [o.name for o in onnx.load(str(file)).graph.output] == ["embeddings"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_16_bit_graph_is_measured_as_a_device_computes_it(tmp_path, precision):
    model, config = small("fused-gelu-mlp")
    file, emulated_file, pixels = tmp_path / "vision.onnx", tmp_path / "emulated.onnx", random_pixels(config)
    expected, rounded = reference(loud(model), pixels), copy.deepcopy(model)
    export_onnx(model, ImageTransform.of(config), file, precision)
    write_emulated(file, emulated_file)
    emulated = VisionSession(emulated_file, config).embed(pixels)
    # torch multiplies in 16 bits itself: operands and result rounded, sums in float32.
    make_exportable(rounded, precision)
    own = run(rounded, pixels)
    ours, theirs = (relative_rms(got, expected.embeddings) for got in (emulated, own))
    assert 0.5 < ours / theirs < 2  # rounding errors soon differ, but their size is comparable
    assert ours < precision_named(precision).relative_rms_max
    parity = measure_parity(file, precision, [pixels], [expected])
    assert parity["projector"] == pytest.approx(relative_rms(emulated, expected.embeddings), rel=1e-3)
    stored = {t.name: t.data_type for t in onnx.load(str(file)).graph.initializer}
    matmuls = [t for name, t in stored.items() if name.startswith("val_") or name.endswith("proj.layer.weight")]
    assert onnx.TensorProto.FLOAT16 in matmuls or onnx.TensorProto.BFLOAT16 in matmuls
    assert file.stat().st_size < 0.62 * _float_size(tmp_path)


def test_an_emulated_product_rounds_operands_and_result(tmp_path):
    """A matmul computed by hand: float16 operands, exact accumulation, rounded once."""
    from onnx import TensorProto, helper, numpy_helper

    weight = NOISE.standard_normal((64, 32)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, width])] for n, width in (("x", 64), ("y", 32))]
    graph = helper.make_graph(nodes, "product", *ends, [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(tmp_path / "a.onnx"))
    write_emulated(tmp_path / "a.onnx", tmp_path / "b.onnx")
    x = NOISE.standard_normal((4, 64), np.float32)
    got, unrounded = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("b", "a")
    )
    exact = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float64)
    step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert (np.abs(got - exact) <= 0.51 * step).all() and (got == got.astype(np.float16)).all()
    assert not np.array_equal(unrounded, unrounded.astype(np.float16))  # why the emulated graph is needed


def _float_size(folder):
    model, config = small("fused-gelu-mlp")
    export_onnx(model, ImageTransform.of(config), folder / "float.onnx")
    return (folder / "float.onnx").stat().st_size


def test_norms_of_loud_channels_do_not_overflow():
    """The square of a channel of 30,000 overflows fp16; sums of squares are float32."""
    model, config = small("gelu-mlp", MINI.encoders[:1])
    with torch.no_grad():
        model.tower.encoders[0].vit.pos_embed[..., 5] += 3e4
    pixels = random_pixels(config)
    expected = reference(model, pixels)
    make_exportable(model, "fp16")
    got = run(model, pixels)
    assert np.abs(expected.features[0]).max() > 2.9e4 and np.isfinite(got).all()
    assert relative_rms(got, expected.embeddings) < 5e-3


def test_attention_with_norms_of_its_own_keeps_its_form():
    import timm

    model, config = small("gelu-mlp", MINI.encoders[:1])
    vit = timm.create_model("vit_small_patch14_reg4_dinov2.lvd142m", num_classes=0, img_size=112, qk_norm=True,
                            **MINI.encoders[0].overrides)  # fmt: skip
    model.tower.encoders[0].vit.blocks = vit.eval().blocks[:4]
    pixels = random_pixels(config)
    expected = run(model, pixels)
    make_exportable(model, "fp32")
    assert_close(run(model, pixels), expected, "vision")


def test_attention_of_a_timm_that_knows_no_gate_and_no_norm_before_its_last_product():
    model, config = small("gelu-mlp", MINI.encoders[:1])
    pixels = random_pixels(config)
    expected = run(model, pixels)
    blocks = model.tower.encoders[0].vit.blocks
    for block in blocks:
        for name in ("norm", "gate", "attn_dim"):
            if hasattr(block.attn, name):  # not in every version of timm
                delattr(block.attn, name)
    assert sum(site.name.endswith("attn.proj") for site in smoothquant._sites(model)) == len(blocks)
    make_exportable(model, "fp32")
    assert all(isinstance(block.attn, exportable._Attention) for block in blocks)
    assert_close(run(model, pixels), expected, "vision")


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox"])
def test_both_input_forms_see_the_same(tmp_path, strategy):
    config = CobraConfig("test", MINI, "gelu-mlp", MambaConfig(64, 1, 512, 128, 16, 4, 4), strategy)
    image = Image.fromarray(NOISE.integers(0, 256, (90, 140, 3), np.uint8))
    seen = []
    for form in ("float32", "uint8"):
        model, transform = small("gelu-mlp")[0], ImageTransform.of(config, form)
        file = tmp_path / f"{form}.onnx"
        pixels = transform.pixels(image)
        assert (pixels.shape, pixels.dtype) == (transform.shape, form)
        export_onnx(model, transform, file)
        seen.append(VisionSession(file, config, form).embed(pixels))
    assert transform.n_squares == (2 if strategy == "letterbox" else 1)
    assert_close(seen[1], seen[0], "onnx")


def test_runtimes_fuse_the_graph(tmp_path):
    """onnxruntime fuses each GELU into one node, and no separate attention scale is left."""
    model, config = small("gelu-mlp", MINI.encoders[1:])
    export_onnx(model, ImageTransform.of(config), tmp_path / "vision.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "vision.onnx", options, providers=["CPUExecutionProvider"])
    counted = [n.op_type for n in onnx.load(str(tmp_path / "optimised.onnx")).graph.node]
    assert counted.count("Gelu") == 4 + 1 and "Erf" not in counted and "Mul" not in counted
    assert counted.count("Softmax") == 4 and counted.count("MatMul") + counted.count("FusedMatMul") == 8


def test_a_graph_that_differs_is_not_shipped(tmp_path):
    model, config = small("linear", MINI.encoders[:1])
    file, pixels = tmp_path / "vision.onnx", random_pixels(config)
    expected = reference(model, pixels)
    model.projector.projector.bias.data += 1
    export_onnx(model, ImageTransform.of(config), file)
    parity = measure_parity(file, "fp32", [pixels], [expected])
    assert parity["encoder 0"] < 1e-5
    with pytest.raises(ParityError, match="vision graph has a relative RMS error of .* at projector"):
        require_parity(parity, "fp32")
    with pytest.raises(ParityError, match="use a wider --vision-precision"):
        require_parity({"projector": float("inf")}, "int8")
    with pytest.raises(ParityError):
        require_parity({"projector": float("nan")}, "fp16")


def test_a_graph_of_another_model_or_form_is_refused(tmp_path):
    model, config = small("linear", MINI.encoders[:1])
    file = tmp_path / "vision.onnx"
    export_onnx(model, ImageTransform.of(config), file)
    with pytest.raises(BundleError, match="inputs and outputs are"):
        VisionSession(file, small("linear")[1])
    with pytest.raises(BundleError, match="inputs and outputs are"):
        VisionSession(file, config, "uint8")
    file.write_bytes(b"no graph")
    with pytest.raises(BundleError, match="onnxruntime cannot open it"):
        VisionSession(file, config)


def test_a_patch_grid_smaller_than_ldpnets_is_pooled_to_half_of_it():
    config = CobraConfig("test", MINI, "fused-ldpnet", MambaConfig(64, 1, 512, 128, 16, 4, 4))
    assert config.n_visual_tokens == 16 and ldpnet_grid(27 * 27) == ldpnet_grid(16 * 16) == ldpnet_grid(14 * 14) == 14


def test_encoders_whose_patches_do_not_match_are_refused():
    other = msgspec.structs.replace(MINI.encoders[1], patch_size=16)
    with pytest.raises(InputError, match="cannot be concatenated"):
        VisionConfig("test", (MINI.encoders[0], other), 112)


@pytest.mark.parametrize(
    ("target", "precision", "reason"),
    [
        ("rtx-2060", "bf16", "needs a GPU of compute capability 8.0 or later, GeForce RTX 2060 6GB has 7.5"),
        ("cpu", "bf16", "onnxruntime has no bfloat16 matmuls"),
    ],
)
def test_a_precision_that_the_target_cannot_run_is_refused(target, precision, reason):
    assert reason in why_not_precision(target_named(target), precision_named(precision))


def test_every_target_can_run_its_own_precision():
    from cobra_edge.formats.targets import targets

    for target in targets().values():
        assert why_not_precision(target, precision_named(target.vision_precision)) is None
    with pytest.raises(InputError, match="did you mean 'fp16'"):
        precision_named("fp15")


def test_a_graph_does_not_say_where_it_was_made(tmp_path):
    model, config = small("gelu-mlp", MINI.encoders[1:])
    export_onnx(model, ImageTransform.of(config), tmp_path / "a.onnx")
    data = (tmp_path / "a.onnx").read_bytes()
    assert b"site-packages" not in data and str(Path(onnx.__file__).parents[1]).encode() not in data
    assert str(Path(__file__).parents[2]).encode() not in data


def test_published_towers_have_static_shapes_of_the_config():
    config = CobraConfig("test", VISION_BACKBONES["dinosiglip-vit-so-384px"], "fused-gelu-mlp",
                         MambaConfig(64, 1, 512, 128, 16, 4, 4))  # fmt: skip
    assert ImageTransform.of(config).shape == (1, 6, 384, 384)
    assert ImageTransform.of(config, "uint8").shape == (1, 384, 384, 3)
    image = load_image(HELDOUT / "000.png")
    assert ImageTransform.of(config, "uint8").pixels(image).shape == (1, 384, 384, 3)
