"""TensorRT for RTX engines: really built, without a GPU, and run on a fake GPU."""

import hashlib
import json
import logging
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cobra_edge.bundle.engine_key import EngineKey
from cobra_edge.bundle.manifest import Manifest, VisionGraph
from cobra_edge.bundle.reader import VISION, Bundle, file_entries
from cobra_edge.environment import available_memory
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import BundleError, InputError, MachineError
from cobra_edge.formats.targets import target_named
from cobra_edge.vision.engines import device_buffers, rtx_builder, tensorrt_rtx
from cobra_edge.vision.engines.cache import EngineCache
from cobra_edge.vision.engines.layer_summary import Layer, LayerSummary, Tensor, read_layers
from cobra_edge.vision.engines.rtx_vision import open_engine, refuses, wanted_key
from cobra_edge.vision.engines.weight_stripping import MAGIC, Header, Piece, restore_weights, strip_weights
from cobra_edge.vision.runtimes import open_vision

from ..fake_cuda import FakeCuda
from .fake_tensorrt_rtx import FakeTensorRT

pytestmark = pytest.mark.extras
SIDE, DEPTH = 64, 3


def float16_graph() -> onnx.ModelProto:
    """Return pixels (1, 64, 64) float32 → matmuls and a softmax in float16 → embeddings (1, 64, 64) float32."""
    random = np.random.default_rng(0)
    weights = [(random.standard_normal((SIDE, 4 * SIDE)) / 8).astype(np.float16) for _ in range(DEPTH)]
    nodes, last = [helper.make_node("Cast", ["pixels"], ["h0"], to=TensorProto.FLOAT16)], "h0"
    for i in range(DEPTH):
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"wide{i}"]),
            helper.make_node("Softmax", [f"wide{i}"], [f"soft{i}"], axis=-1),
            helper.make_node("MatMul", [f"soft{i}", f"v{i}"], [f"h{i + 1}"]),
        ]
        last = f"h{i + 1}"
    nodes.append(helper.make_node("Cast", [last], ["embeddings"], to=TensorProto.FLOAT))
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    tensors += [numpy_helper.from_array(np.ascontiguousarray(w.T), f"v{i}") for i, w in enumerate(weights)]
    shape = [1, SIDE, SIDE]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("pixels", "embeddings")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    file = tmp_path / "graph" / VISION
    file.parent.mkdir()
    onnx.save(float16_graph(), str(file))
    return file


def files_of(graph: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in graph.parent.glob(f"{VISION}*")}


def build(graph: Path, file: Path, precision: str = "fp16", capabilities: tuple[str, ...] = ("8.9",), **options):
    return tensorrt_rtx.build_engine(graph, file, precision, capabilities, "0" * 64, **options)


# --- builds -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(mini_bundle, tmp_path_factory) -> tuple[Path, dict[str, EngineKey]]:
    """Return a stage with cobra-mini's tower, and its engine for any GPU."""
    stage = tmp_path_factory.mktemp("stage")
    (stage / VISION).write_bytes(
        (mini_bundle("w4a16-g128", vision_precision="fp32", vision_input="float32") / VISION).read_bytes()
    )
    heard: list[tuple[str, int, int]] = []
    engines = tensorrt_rtx.add_engine(
        stage, files_of(stage / VISION), "fp32", target_named("rtx"), on_progress=lambda *said: heard.append(said)
    )
    done = [d for _, d, _ in heard]
    assert done == sorted(done) and done[-1] == heard[-1][2] and len(set(done)) > 2
    return stage, engines


def test_the_towers_engine_has_the_graphs_layers_inputs_outputs_and_precision(tower):
    stage, engines = tower
    ((name, key),) = engines.items()
    assert sorted(f.name for f in (stage / "engines").iterdir()) == [f"{key.stem}.engine", f"{key.stem}.layers.json"]
    assert name == f"engines/{key.stem}.engine"
    engine = (stage / name).read_bytes()
    assert engine[:4] == b"vtrt" and len(engine) > (stage / VISION).stat().st_size  # weights embedded
    layers = msgspec.json.decode((stage / "engines" / f"{key.stem}.layers.json").read_bytes(), type=LayerSummary)
    assert layers.inputs == (Tensor("pixels", "Float", (1, 6, 112, 112)),)
    assert layers.outputs == (Tensor("embeddings", "Float", (1, 64, 256)),)
    assert set(layers.dtypes()) == {"Float"}
    # Seven blocks in two encoders, and a projector: per block four matmuls with weights, two with activations.
    matmuls = layers.kinds().get("gemm", 0) + layers.kinds().get("runtime_fusion", 0)
    assert matmuls >= 7 * 4 and layers.kinds()["correlation"] == 2  # the two patch embeddings


def test_the_key_says_version_gpus_precision_and_graph(tower):
    stage, engines = tower
    (key,) = engines.values()
    assert (key.runtime, key.version) == ("tensorrt-rtx", tensorrt_rtx.library_version())
    assert key.capabilities == tuple(c for c in tensorrt_rtx.supported_capabilities() if c != "7.5")
    assert {"8.6", "8.9", "12.0"} <= set(key.capabilities)
    assert key.precision == "fp32" and not key.stripped
    onnx_file = stage / VISION
    assert key.onnx_sha256 == tensorrt_rtx.onnx_digest(files_of(onnx_file))


@pytest.mark.parametrize("capabilities", [("8.6",), ("7.5",), ("12.0", "8.9")])
def test_a_float16_graph_is_multiplied_in_float16(graph, tmp_path, capabilities):
    built = build(graph, tmp_path / "engine", capabilities=capabilities)
    assert built.key.capabilities == tuple(sorted(capabilities, key=float))
    matmuls = [layer for layer in built.layers.layers if layer.kind != "kgen" or "gemm" in layer.name]
    assert matmuls and all("Half" in layer.dtypes for layer in matmuls)
    assert built.layers.inputs[0].dtype == built.layers.outputs[0].dtype == "Float"


def test_a_quantized_product_is_multiplied_in_int8(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "codes": random.integers(-127, 128, (SIDE, SIDE)).astype(np.int8),
        "scales": np.full(SIDE, 0.01, np.float32),
        "zeros": np.zeros(SIDE, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["pixels", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "scale", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["weight"], axis=1),
        helper.make_node("MatMul", ["input", "weight"], ["product"]),
        helper.make_node("Gelu", ["product"], ["embeddings"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, SIDE, SIDE]) for n in ("pixels", "embeddings")]
    values = [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()]
    whole = helper.make_graph(nodes, "graph", ends[:1], ends[1:], values)
    onnx.save(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / VISION))
    built = build(tmp_path / VISION, tmp_path / "engine", "int8", ("8.6", "8.9"))
    assert [("Int8" in layer.dtypes) for layer in built.layers.layers if layer.kind == "gemm"] == [True]


def test_weights_beside_the_graph_are_found(graph, tmp_path):
    model = onnx.load(str(graph))
    onnx.save(model, str(graph), save_as_external_data=True, location=f"{VISION}.data", size_threshold=0)
    assert (graph.parent / f"{VISION}.data").stat().st_size >= 2 * DEPTH * SIDE * 4 * SIDE * 2
    build(graph, tmp_path / "whole")
    saved = strip_weights(tmp_path / "whole", graph, tmp_path / "stripped")
    assert saved == 2 * DEPTH * SIDE * 4 * SIDE * 2
    files = {n: graph.parent / n for n in files_of(graph)}
    assert restore_weights(tmp_path / "stripped", files) == (tmp_path / "whole").read_bytes()


# --- weights left out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capabilities", [("8.6",), ("8.6", "8.9")])  # the data before the weights differ in length
def test_an_engine_without_weights_is_put_together_again_from_the_graph(graph, tmp_path, capabilities):
    whole = build(graph, tmp_path / "whole", capabilities=capabilities)
    weights = 2 * DEPTH * SIDE * 4 * SIDE * 2
    stripped = build(graph, tmp_path / "stripped", capabilities=capabilities, strip_weights=True)
    assert stripped.key.stripped and stripped.key.stem != whole.key.stem
    size = (tmp_path / "whole").stat().st_size
    assert (tmp_path / "stripped").stat().st_size < size - 0.9 * weights
    engine = restore_weights(tmp_path / "stripped", {VISION: graph})
    assert engine[:4] == b"vtrt" and abs(len(engine) - size) < 0.05 * size


def test_without_the_weights_of_its_graph_an_engine_is_refused(graph, tmp_path):
    build(graph, tmp_path / "stripped", strip_weights=True)
    other = bytearray(graph.read_bytes())
    other[len(other) // 2] ^= 1
    graph.write_bytes(other)
    with pytest.raises(BundleError, match="differs from the one that was built"):
        restore_weights(tmp_path / "stripped", {VISION: graph})
    graph.write_bytes(other[:1000])
    with pytest.raises(BundleError, match="does not have"):
        restore_weights(tmp_path / "stripped", {VISION: graph})


def test_damaged_engines_without_weights_are_refused(graph, tmp_path):
    file = tmp_path / "stripped"
    build(graph, file, strip_weights=True)
    good = file.read_bytes()
    for damaged, message in (
        (b"", "not an engine without weights"),
        (b"x" + good[1:], "not an engine without weights"),
        (good[:-1], "bytes besides its weights"),
        (good[:60], "not an engine without weights"),
        (good.replace(b'"bytes":', b'"bites":', 1), "its header is invalid"),
        (good.replace(b'"vision.onnx"', b'"../ion.onnx"', 1), "does not have"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(BundleError, match=message):
            restore_weights(file, {VISION: graph})


def test_an_engine_that_claims_more_memory_than_there_is_is_refused_before_it_is_made(tmp_path, monkeypatch):
    (tmp_path / VISION).write_bytes(bytes(1_000_000))
    pieces = tuple(Piece(1_000_000 * i, 1_000_000, VISION, 0) for i in range(60_000))  # the graph again and again
    text = msgspec.json.encode(Header(60 * 10**9, "0" * 64, pieces))
    (tmp_path / "stripped").write_bytes(MAGIC + len(text).to_bytes(8, "little") + text)
    (tmp_path / "meminfo").write_text("MemAvailable: 1000000 kB\n")
    monkeypatch.setattr(available_memory, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(MachineError, match=r"weights takes about 60\.0 GB of memory, 1\.0 GB are available"):
        restore_weights(tmp_path / "stripped", {VISION: tmp_path / VISION})


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "capabilities", "message"),
    [
        ("fp32", ("7.5",), "no float32 matmuls on compute capability 7.5, and fp32 has some; use fp16"),
        ("bf16", ("8.6", "7.5"), "bf16 needs a GPU of compute capability 8.0 or later, the oldest requested GPU has 7.5"),
        ("fp16", ("9.0", "8.6"), "does not support compute capability 9.0; it supports 7.5, 8.0, 8.6"),
        ("fp16", (), "does not support compute capability none"),
    ],
)
def test_what_the_gpus_cannot_do_is_refused_before_the_build(graph, tmp_path, precision, capabilities, message):
    with pytest.raises(InputError, match=message):
        build(graph, tmp_path / "engine", precision, capabilities)
    assert not (tmp_path / "engine").exists()


def test_the_library_itself_multiplies_no_float32_on_turing(tower, tmp_path):
    job = rtx_builder.Job(str(tower[0] / VISION), str(tmp_path / "engine"), ("7.5",), 1)
    failed = rtx_builder.build(job, lambda event: None)
    assert isinstance(failed, rtx_builder.Failed) and "FP32" in failed.reason and not failed.unreadable


def test_a_file_that_is_no_graph_is_refused_in_the_librarys_words(tmp_path, capfd):
    file = tmp_path / VISION
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"TensorRT for RTX .* cannot parse it"):
        build(file, tmp_path / "engine")
    assert capfd.readouterr() == ("", "") and [f.name for f in tmp_path.iterdir()] == [VISION]


def test_a_graph_that_it_cannot_build_is_refused(graph, tmp_path, capfd):
    model = onnx.load(str(graph))
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, str(graph))
    with pytest.raises(InputError, match="NoSuchOperator"):
        build(graph, tmp_path / "engine")
    assert capfd.readouterr() == ("", "") and [f.name for f in tmp_path.iterdir()] == ["graph"]


def test_too_little_memory_is_told_before_the_build(graph, tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 900000 kB\nMemAvailable:   100000 kB\n")
    monkeypatch.setattr(available_memory, "_MEMINFO", meminfo)
    with pytest.raises(MachineError, match=r"takes about 0.5 GB of memory, 0.1 GB are available"):
        build(graph, tmp_path / "engine")


def test_where_the_library_is_not_installed_it_is_said_how_to_get_it(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_rtx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=re.escape(f"tensorrt_rtx is not installed ({install_hint('rtx')})")):
        build(graph, tmp_path / "engine")


# --- the end of a build -----------------------------------------------------------------------------------------------------


@pytest.fixture
def builders(monkeypatch) -> list[subprocess.Popen]:
    """Return every builder process that is started."""
    started: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(tensorrt_rtx.subprocess, "Popen", Recorded)
    return started


def test_an_interrupted_build_ends_its_builder_and_leaves_nothing(tower, tmp_path, builders):
    def interrupt(*_said):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tower[0] / VISION, tmp_path / "engine", "fp32", on_progress=interrupt)
    assert [b.returncode for b in builders] == [-9] and list(tmp_path.iterdir()) == []


def test_a_builder_that_is_killed_is_told_with_the_memory_it_takes(tower, tmp_path, builders):
    with pytest.raises(MachineError, match=r"killed by SIGKILL, most likely out of memory; about 0\.5 GB are needed"):
        build(tower[0] / VISION, tmp_path / "engine", "fp32", on_progress=lambda *said: builders[0].kill())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "says"), [("exit 3", "code 3"), ("printf '{\"type'; kill -9 $$", "SIGKILL")])
def test_a_builder_that_ends_before_it_is_asked_or_in_the_middle_of_a_word(graph, tmp_path, monkeypatch, script, says):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(tensorrt_rtx.sys, "executable", str(python))
    with pytest.raises(MachineError, match=says):
        build(graph, tmp_path / "engine")


def test_a_builder_that_nobody_listens_to_stops_by_itself(tower, tmp_path):
    def closed(_event):
        raise BrokenPipeError

    job = rtx_builder.Job(str(tower[0] / VISION), str(tmp_path / "engine"), ("8.9",), 1)
    with pytest.raises(BrokenPipeError):
        rtx_builder.build(job, closed)
    assert (tmp_path / "engine").stat().st_size == 0  # writing had not begun


def test_a_full_disk_is_told(tower, monkeypatch):
    job = rtx_builder.Job(str(tower[0] / VISION), "/dev/full", ("8.9",), 1)
    ran = subprocess.run(
        [sys.executable, "-m", "cobra_edge.vision.engines.rtx_builder"],
        input=msgspec.json.encode(job),
        capture_output=True,
        check=True,
    )
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["type"] == "failed" and "No space left" in last["reason"]


# --- layers -----------------------------------------------------------------------------------------------------------------


def test_layers_are_read_from_the_builders_words():
    half, int8 = (
        f"{{ Name: x, Dimensions: [1,2], Strides: [2,1], StrideOrder: [1,0], Datatype: {dtype}, Format: (Linear) Row }}"
        for dtype in ("Half", "Int8")
    )
    text = (
        "Layers:\n"
        f"Name: mul_0, LayerType: gemm, Inputs: [ {half}], Constants: [ {int8}, {int8}], Outputs: [ {half}], TacticName: t, "
        "StreamId: 0, Metadata: [ONNX Layer: mul]\n"
        "Name: mul_1, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, Metadata: \n"
        "\nI/O Tensors:\n Name: a, IOMode: Input, DataType: UInt8, Dimensions: [1,2], Location: Device\n"
        " Name: b, IOMode: Output, DataType: Float, Dimensions: [], Location: Device\n"
    )
    assert read_layers(text) == LayerSummary(
        (Layer("mul_0", "gemm", ("Half", "Int8")),), (Tensor("a", "UInt8", (1, 2)),), (Tensor("b", "Float", ()),)
    )
    assert read_layers("") == LayerSummary((), (), ())


# --- on a GPU --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch, tmp_path) -> FakeCuda:
    """Return a fake GPU, and an empty cache directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = FakeCuda()
    monkeypatch.setattr(device_buffers, "_cuda", lambda: fake)
    return fake


@pytest.fixture
def rtx_bundle(tower, mini_bundle) -> Bundle:
    """Return a bundle as exported for any RTX GPU, in memory, with the staged tower."""
    stage, engines = tower
    manifest = Bundle.open(mini_bundle("w4a16-g128", vision_precision="fp32", vision_input="float32")).manifest
    return Bundle(stage, msgspec.structs.replace(manifest, engines=engines, files=file_entries(stage)))


def fake_rtx(cuda: FakeCuda, monkeypatch, version: str = tensorrt_rtx.library_version(), **options) -> FakeTensorRT:
    shapes = {"inputs": {"pixels": ((1, 6, 112, 112), np.float32)}, "outputs": {"embeddings": ((1, 64, 256), np.float32)}}
    fake = FakeTensorRT(cuda, **{**shapes, "function": lambda pixels: pixels.astype(np.float32).mean(), **options})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.module(version))
    return fake


def with_manifest(bundle: Bundle, **changes) -> Bundle:
    manifest: Manifest = msgspec.structs.replace(bundle.manifest, **changes)
    return Bundle(bundle.directory, manifest)


def with_key(bundle: Bundle, **changes) -> Bundle:
    ((name, key),) = bundle.manifest.engines.items()
    return with_manifest(bundle, engines={name: msgspec.structs.replace(key, **changes)})


def test_the_engine_of_the_bundle_runs_on_the_gpu(rtx_bundle, cuda, monkeypatch):
    fake = fake_rtx(cuda, monkeypatch)
    assert refuses(rtx_bundle) is None
    vision = open_engine(rtx_bundle)
    (name,) = rtx_bundle.manifest.engines
    assert fake.opened == [(rtx_bundle.directory / name).read_bytes()]
    assert vision.name == f"TensorRT for RTX {tensorrt_rtx.library_version()}, GeForce Test 3060, fp32"
    for value in (0.5, -2.0):
        embeddings = vision.embed(np.full((1, 6, 112, 112), value, np.float32))
        assert embeddings.shape == (64, 256) and embeddings.dtype == np.float32 and (embeddings == value).all()
    with pytest.raises(ValueError, match="expected contiguous float32"):
        vision.embed(np.zeros((1, 3, 112, 112), np.float32))
    vision.close()
    assert cuda.memory == {} and cuda.streams == {}


def test_images_go_in_as_they_are_where_the_graph_takes_them(rtx_bundle, cuda, monkeypatch):
    fake_rtx(cuda, monkeypatch, inputs={"pixels": ((1, 112, 112, 3), np.uint8)})
    bundle = with_manifest(rtx_bundle, vision=VisionGraph(input="uint8"))
    vision = open_engine(bundle)
    assert (vision.embed(np.full((1, 112, 112, 3), 7, np.uint8)) == 7).all()


def test_an_engine_without_weights_is_opened_whole(rtx_bundle, cuda, monkeypatch, tmp_path):
    ((name, key),) = rtx_bundle.manifest.engines.items()
    whole = (rtx_bundle.directory / name).read_bytes()
    fake = fake_rtx(cuda, monkeypatch, engines=[whole])
    (tmp_path / "engines").mkdir()
    graph = tmp_path / VISION
    graph.write_bytes((rtx_bundle.directory / VISION).read_bytes())
    strip_weights(rtx_bundle.directory / name, graph, tmp_path / name)
    stripped = Bundle(tmp_path, with_key(rtx_bundle, stripped=True).manifest)
    assert refuses(stripped) is None
    open_engine(stripped)
    assert fake.opened == [whole]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.0.0"}, "built by TensorRT for RTX 1.0.0, .* is installed"),
        ({"capabilities": ("8.9", "12.0")}, "for compute capability 8.9, 12.0, GeForce Test 3060 has 8.6"),
        ({"precision": "fp16"}, "computes in fp16, its graph in fp32"),
        ({"onnx_sha256": "0" * 64}, "built from another graph"),
    ],
)
def test_an_engine_for_something_else_is_built_again_once(rtx_bundle, cuda, monkeypatch, caplog, changes, message):
    fake = fake_rtx(cuda, monkeypatch)
    bundle = with_key(rtx_bundle, **changes)
    key = wanted_key(bundle, device_buffers.first_gpu())
    assert refuses(bundle) is None
    with caplog.at_level(logging.WARNING):
        open_engine(bundle)
        open_engine(bundle)
    assert len(caplog.messages) == 2 and caplog.messages[0] == caplog.messages[1]
    assert re.search(message, caplog.text)
    built = EngineCache().read(key)
    assert fake.opened == [built, built] and built[:4] == b"vtrt"
    assert not [f for f in EngineCache().directory.iterdir() if f.name.startswith(".")]


def test_what_cannot_run_here_is_refused_with_the_reason(rtx_bundle, cuda, monkeypatch, tmp_path):
    fake_rtx(cuda, monkeypatch)
    assert "without an engine of TensorRT for RTX" in refuses(with_manifest(rtx_bundle, engines={}))
    cuda.change(capability="9.0")
    assert "does not support GeForce Test 3060 (compute capability 9.0)" in refuses(rtx_bundle)
    cuda.change(capability="7.5")
    assert "no float32 matmuls on compute capability 7.5" in refuses(rtx_bundle)
    cuda.change(capability="8.6")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 1000 kB\n")
    monkeypatch.setattr(available_memory, "_MEMINFO", meminfo)
    assert refuses(rtx_bundle) is None  # nothing is to be built
    assert "building one takes about 0.5 GB" in refuses(with_key(rtx_bundle, onnx_sha256="1" * 64, version="0.9"))
    cuda.driver = 0
    assert refuses(rtx_bundle) == "there is no NVIDIA driver"
    cuda.driver, cuda.gpu = 13000, ""
    assert "no CUDA-capable device is detected" in refuses(rtx_bundle)
    monkeypatch.setattr(tensorrt_rtx.importlib.util, "find_spec", lambda name: None)
    assert refuses(rtx_bundle) == f"tensorrt_rtx is not installed ({install_hint('rtx')})"


def test_an_engine_that_the_manifest_does_not_vouch_for_is_never_opened(rtx_bundle, cuda, monkeypatch, caplog):
    fake = fake_rtx(cuda, monkeypatch)
    ((name, key),) = rtx_bundle.manifest.engines.items()
    open_engine(with_manifest(rtx_bundle, engines={f"../{rtx_bundle.directory.name}/{name}": key}))
    assert "is not among the bundle's files" in caplog.text
    assert fake.opened == [EngineCache().read(wanted_key(rtx_bundle, device_buffers.first_gpu()))]


def test_the_table_prefers_the_gpu_and_says_why_it_is_not_taken(rtx_bundle, cuda, monkeypatch):
    fake_rtx(cuda, monkeypatch)
    assert open_vision(rtx_bundle).name.startswith("TensorRT for RTX")
    cuda.driver = 0
    with pytest.raises(MachineError, match="tensorrt-rtx: there is no NVIDIA driver"):
        open_vision(rtx_bundle, runtime="tensorrt-rtx")


def test_an_engine_that_the_library_will_not_open_is_told_in_its_words(rtx_bundle, cuda, monkeypatch):
    fake_rtx(cuda, monkeypatch, engines=[])
    with pytest.raises(MachineError, match="opening the engine failed: the magic tag does not match"):
        open_engine(rtx_bundle)
    assert cuda.streams == {}


def test_an_empty_engine_is_told_in_the_librarys_words(rtx_bundle, cuda, monkeypatch, tmp_path):
    fake_rtx(cuda, monkeypatch, engines=[])
    (name,) = rtx_bundle.manifest.engines
    (tmp_path / "engines").mkdir()
    (tmp_path / name).touch()
    with pytest.raises(MachineError, match="the magic tag does not match"):
        open_engine(Bundle(tmp_path, rtx_bundle.manifest))


def test_a_run_that_fails_is_told_in_the_librarys_words(rtx_bundle, cuda, monkeypatch):
    fake = fake_rtx(cuda, monkeypatch)
    vision = open_engine(rtx_bundle)
    fake.fails = True
    with pytest.raises(MachineError, match=r"running the engine failed: no address for \[\]"):
        vision.embed(np.zeros((1, 6, 112, 112), np.float32))


@pytest.fixture
def on_stream(rtx_bundle, cuda, monkeypatch):
    """Return an open engine, its fake, a decoder's stream and two embedding buffers, after the first image."""
    fake = fake_rtx(cuda, monkeypatch)
    vision = open_engine(rtx_bundle)
    vision.embed(IMAGE)
    stream = device_buffers.Stream()
    rooms = [device_buffers.DeviceBuffer((64, 256), np.float32) for _ in range(2)]
    return vision, fake, stream, rooms


IMAGE = np.ones((1, 6, 112, 112), np.float32)


def in_room(cuda, room) -> np.ndarray:
    return cuda.memory[room.address].view(np.float32)


def test_embeddings_stay_on_the_gpu_on_the_decoders_stream(on_stream, cuda):
    vision, _, stream, rooms = on_stream
    image = IMAGE * 3
    kept = weakref.ref(image)
    vision.embed_into(image, rooms[0].address, stream.handle)
    del image
    assert np.isnan(in_room(cuda, rooms[0])).all()  # only enqueued, without waiting
    assert kept() is not None  # nor was it copied yet
    stream.synchronize()
    assert (in_room(cuda, rooms[0]) == 3).all() and np.isnan(in_room(cuda, rooms[1])).all()
    vision.embed_into(IMAGE * 4, rooms[1].address, stream.handle)
    assert kept() is None
    vision.close()
    assert cuda.memory.keys() == {r.address for r in rooms} and cuda.streams.keys() == {stream.handle}


def test_one_image_waits_for_the_other_whatever_the_stream(on_stream, cuda):
    vision, _, stream, rooms = on_stream
    other = device_buffers.Stream()
    vision.embed_into(IMAGE * 3, rooms[0].address, stream.handle)
    vision.embed_into(IMAGE * 4, rooms[1].address, other.handle)
    assert (in_room(cuda, rooms[0]) == 3).all()
    assert (vision.embed(IMAGE * 5) == 5).all()
    assert (in_room(cuda, rooms[0]) == 3).all() and (in_room(cuda, rooms[1]) == 4).all()


def test_what_is_under_way_is_done_before_the_engine_is_closed(on_stream, cuda):
    vision, _, stream, rooms = on_stream
    vision.embed_into(IMAGE * 3, rooms[0].address, stream.handle)
    vision.close()
    vision.close()
    assert (in_room(cuda, rooms[0]) == 3).all() and cuda.streams[stream.handle] == []


def test_kernels_are_kept_after_the_first_image_on_the_decoders_stream(rtx_bundle, cuda, monkeypatch):
    cuda.change(name="GeForce Kept 3060")
    fake_rtx(cuda, monkeypatch)
    stream, room = device_buffers.Stream(), device_buffers.DeviceBuffer((64, 256), np.float32)
    open_engine(rtx_bundle).embed_into(IMAGE, room.address, stream.handle)
    (file,) = EngineCache().directory.glob("*-geforce-kept-3060.kernels")
    assert file.read_bytes().endswith(b"kernels") and (in_room(cuda, room) == 1).all()


def test_a_run_that_fails_on_the_decoders_stream_is_told_and_the_next_goes_on(on_stream, cuda):
    vision, fake, stream, rooms = on_stream
    fake.fails = True
    with pytest.raises(MachineError, match="running the engine failed"):
        vision.embed_into(IMAGE, rooms[0].address, stream.handle)
    with pytest.raises(MachineError, match="setting the address of embeddings failed"):
        vision.embed_into(IMAGE, 1, stream.handle)
    fake.fails = False
    vision.embed_into(IMAGE * 3, rooms[0].address, stream.handle)
    stream.synchronize()
    assert (in_room(cuda, rooms[0]) == 3).all()


def test_a_gpu_without_room_is_told_and_nothing_is_kept(rtx_bundle, cuda, monkeypatch):
    fake_rtx(cuda, monkeypatch)
    cuda.change(free="310000")  # the input fits into memory, the output does not
    with pytest.raises(MachineError, match=r"allocating 0.1 MB on the GPU failed: out of memory \(CUDA error 2\)"):
        open_engine(rtx_bundle)
    assert cuda.memory == {} and cuda.streams == {}


@pytest.mark.parametrize(
    "io",
    [
        {"outputs": {"embeddings": ((1, 64, 128), np.float32)}},
        {"inputs": {"pixels": ((1, 112, 112, 3), np.uint8)}},
        {"inputs": {"pixels": ((1, 6, 112, 112), np.float32), "more": ((1,), np.float32)}},
    ],
)
def test_an_engine_with_other_inputs_or_outputs_is_refused(rtx_bundle, cuda, monkeypatch, io):
    fake_rtx(cuda, monkeypatch, **io)
    with pytest.raises(BundleError, match="expected one input of float32 and one output of float32"):
        open_engine(rtx_bundle)


def test_compiled_kernels_are_kept_and_damage_only_costs_time(rtx_bundle, cuda, monkeypatch, caplog):
    pixels = np.zeros((1, 6, 112, 112), np.float32)
    cuda.change(name="GeForce Kept 3060")
    fake = fake_rtx(cuda, monkeypatch)
    open_engine(rtx_bundle).embed(pixels)
    (file,) = EngineCache().directory.glob("*-geforce-kept-3060.kernels")
    assert fake.caches == [] and file.read_bytes().endswith(b"kernels")
    open_engine(rtx_bundle).embed(pixels)
    assert fake.caches == [(b"kernels", True)]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.INFO):
        open_engine(rtx_bundle).embed(pixels)
    assert len(fake.caches) == 1 and "recompiled" in caplog.text  # the library never got the damaged ones
    assert file.read_bytes().endswith(b"kernels")


def test_the_fake_gpu_finds_what_it_is_there_to_find(cuda):
    stream = device_buffers.Stream()
    buffer = device_buffers.DeviceBuffer((4,), np.float32)
    out = np.zeros(4, np.float32)
    buffer.copy_in(np.arange(4, dtype=np.float32), stream)
    buffer.copy_out(out, stream)
    assert (out == 0).all()  # nothing has happened before the stream is synchronized
    stream.synchronize()
    assert (out == np.arange(4)).all()
    address = buffer.address
    buffer.close()
    buffer.close()
    buffer.address = address
    with pytest.raises(MachineError, match="copying to or from the GPU failed"):
        buffer.copy_out(out, stream)


def test_progress_does_not_fall_where_a_phase_ends_before_the_step_around_it_counts(monkeypatch):
    monkeypatch.setattr(rtx_builder, "_REPORT_SECONDS", 0.0)
    told: list[float] = []
    monitor = rtx_builder._monitor(SimpleNamespace(IProgressMonitor=object), lambda event: told.append(event.share))
    monitor.phase_start("build", None, 2)
    for name, step in (("first", 0), ("second", 1)):
        monitor.phase_start(name, "build", 2)
        monitor.step_complete(name, 0)
        monitor.phase_finish(name)
        monitor.phase_start("tidy", "build", 1)  # within the same step
        monitor.phase_finish("tidy")
        monitor.step_complete("build", step)
    assert told == sorted(told) and len(set(told)) == 5 and told[-1] == rtx_builder._COMPILING
