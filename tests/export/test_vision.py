"""Exports with a vision precision, an input form and an engine, as a user asks for them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from cobra_edge.bench.random_export import budget_without_limits
from cobra_edge.bundle.reader import MANIFEST, VISION, Bundle, file_entries
from cobra_edge.cli import command as whole
from cobra_edge.errors import BundleError
from cobra_edge.export import vision as assemble_vision
from cobra_edge.suite.line import Line
from cobra_edge.suite.line_set import LineSet
from cobra_edge.suite.reader import HELDOUT
from cobra_edge.terminal.output import run_command
from cobra_edge.vision.engines import tensorrt_rtx
from cobra_edge.vision.engines.layer_summary import LayerSummary

from ..conftest import MINI


@pytest.fixture
def export(tmp_path, capfd, sharing):
    """Export cobra-mini, its graph shared by tests of one precision; returns exit code, stdout and stderr."""

    def run(*arguments, target="rtx-4060"):
        budget = ["--budget", str(budget_without_limits(tmp_path))]
        out = [
            "--target",
            target,
            "--out",
            str(tmp_path / "out" / "bundle"),
            *budget,
            "--golden-lines",
            "2",
            "--quality",
            "fast",
        ]
        with sharing():
            code = run_command(whole, ["export", *out, *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def layers_of(bundle):
    (name,) = bundle.manifest.engines
    return msgspec.json.decode(bundle.path(name).with_suffix(".layers.json").read_bytes(), type=LayerSummary)


def products(layers, dtype):
    return sum(dtype in layer.dtypes for layer in layers.layers if layer.kind in ("gemm", "runtime_fusion", "correlation"))


def test_an_rtx_target_gets_an_engine_of_16_bits(export, tmp_path):
    assert export()[0] == 0
    bundle = Bundle.open(tmp_path / "out" / "bundle")
    ((name, key),) = bundle.manifest.engines.items()
    assert name in bundle.manifest.files
    assert (key.capabilities, key.precision, key.stripped) == (("8.9",), "fp16", False)
    assert key.onnx_sha256 == tensorrt_rtx.onnx_digest(bundle.graph_files)
    layers = layers_of(bundle)
    assert [(t.dtype, t.shape) for t in (*layers.inputs, *layers.outputs)] == [
        ("UInt8", (1, 112, 112, 3)),
        ("Float", (1, 64, 256)),
    ]
    assert products(layers, "Half") >= 7 * 3
    assert any("mha" in layer.name for layer in layers.layers)  # attention is one kernel


def test_an_int8_engine_multiplies_in_int8(export, tmp_path):
    code, out, _ = export("--vision-precision", "int8", "--json")
    assert code == 0
    bundle = Bundle.open(tmp_path / "out" / "bundle")
    graph = json.loads(out)["manifest"]["vision"]
    assert (graph["precision"], graph["input"]) == ("int8", "uint8") and graph["parity"]["projector"] < 0.03
    assert products(layers_of(bundle), "Int8") >= 30
    assert bundle.manifest.files[VISION].bytes < 5e6


def test_an_engine_without_its_weights_is_smaller(export, tmp_path):
    assert export("--engine", "stripped")[0] == 0
    bundle = Bundle.open(tmp_path / "out" / "bundle")
    ((name, key),) = bundle.manifest.engines.items()
    assert key.stripped and bundle.manifest.files[name].bytes < 8e6
    assert run_command(whole, ["inspect", str(bundle.directory)]) == 0


def test_inspect_tells_precision_parity_and_engine(export, tmp_path, capfd):
    export()
    assert run_command(whole, ["inspect", str(tmp_path / "out" / "bundle")]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "vision graph: fp16, input uint8; relative RMS error against torch: encoder 0 0.000" in said
    assert "tensorrt-rtx 1" in said and "compute capability 8.9, with weights" in said


def test_without_the_library_a_bundle_goes_without_an_engine(export, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_rtx, "why_no_tensorrt_rtx", lambda: "tensorrt_rtx is not installed (pip install it)")
    code, _, err = export()
    assert code == 0 and "no engine for GeForce RTX 4060 8GB: tensorrt_rtx is not installed" in " ".join(err.split())
    assert Bundle.open(tmp_path / "out" / "bundle").manifest.engines == {}
    code, _, err = export("--engine", "embedded", "--force")
    assert code == 3 and "--engine embedded: tensorrt_rtx is not installed (pip install it)" in " ".join(err.split())


@pytest.mark.parametrize(
    ("target", "arguments", "says"),
    [
        ("jetson", ("--engine", "embedded"), "python -m cobra_edge.build BUNDLE"),
        ("jetson", ("--vision-precision", "fp15"), "did you mean 'fp16'"),
        ("rtx-2060", ("--vision-precision", "bf16"), "compute capability 8.0 or later, GeForce RTX 2060 6GB has 7.5"),
        ("cpu", ("--vision-precision", "bf16"), "has no bfloat16 matmuls"),
        ("cpu", ("--engine", "magic"), "--engine: "),
    ],
)
def test_what_a_target_cannot_run_is_refused_before_any_work(export, tmp_path, target, arguments, says):
    code, _, err = export(*arguments, target=target)
    assert code == 2 and says in " ".join(err.split()) and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_int8_wants_images(export, tmp_path):
    suite = tmp_path / "text.jsonl"
    suite.write_text('{"prompt": "Hello?", "answer": "Yes", "task": "text"}\n')
    code, _, err = export("--vision-precision", "int8", "--calibration", str(suite), target="cpu")
    assert code == 2 and "calibrated on images, the suite has none" in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("n", "n_visual_tokens", "taken"), [(1, 64, 1), (64, 64, 64), (1000, 64, 64), (200, 729, 11), (9, 9999, 1)]
)
def test_int8_takes_some_images_of_a_large_suite(n, n_visual_tokens, taken):
    names = [f"{i:04}.png" for i in range(n)]
    lines = LineSet("many", [Line("What is it?", "a dot", "color", image) for image in names], Path())
    chosen = assemble_vision.calibration_images(lines, SimpleNamespace(n_visual_tokens=n_visual_tokens))
    assert len(chosen) == taken and chosen == sorted(set(chosen)) and chosen[0].name == names[0]


def test_a_runtime_that_is_not_here_is_refused_with_the_reason(mini_bundle, capfd):
    question = ["--image", str(MINI / "demo.png"), "--prompt", "What is in the image?"]
    for runtime, says in (("tensorrt-rtx", "exported without an engine"), ("tensorrt", "it comes with JetPack")):
        assert run_command(whole, ["run", str(mini_bundle("w4a16-g128")), "--vision-runtime", runtime, *question]) == 3
        assert says in " ".join(capfd.readouterr().err.split())


def test_a_graph_that_was_edited_is_refused(mini_bundle, tmp_path, capfd):
    shutil.copytree(mini_bundle("w4a16-g128"), tmp_path / "b")
    graph = tmp_path / "b" / VISION
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    assert run_command(whole, ["run", str(tmp_path / "b"), "--prompt", "?"]) == 2
    assert "sha256 differs" in capfd.readouterr().err


def test_a_bfloat16_bundle_does_not_run_on_a_processor(mini_bundle, capfd):
    path = mini_bundle("w4a16-g128", vision_precision="bf16")
    assert Bundle.open(path).manifest.drift.vision_runtime == "onnxruntime, CPU, bf16 emulated"
    assert run_command(whole, ["run", str(path), "--image", str(MINI / "demo.png"), "--prompt", "?"]) == 3
    assert "has no bfloat16 matmuls" in " ".join(capfd.readouterr().err.split())


def test_an_engine_that_the_manifest_has_no_hash_of_is_refused(export, tmp_path):
    export()
    directory = tmp_path / "out" / "bundle"
    manifest = Bundle.open(directory).manifest
    files = {name: entry for name, entry in file_entries(directory).items() if not name.endswith(".engine")}
    (directory / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
    with pytest.raises(BundleError, match="no hash of engines/"):
        Bundle.open(directory)


def test_an_image_file_of_another_form_is_refused(mini_bundle, tmp_path):
    shutil.copytree(mini_bundle("w4a16-g128"), tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    graph = msgspec.structs.replace(manifest.vision, input="float32")
    (tmp_path / "b" / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, vision=graph)))
    with pytest.raises(BundleError, match="does not match the model config"):
        Bundle.open(tmp_path / "b").image()


def test_float_pixels_can_be_asked_for(export, tmp_path):
    assert export("--vision-input", "float32", target="cpu")[0] == 0
    bundle = Bundle.open(tmp_path / "out" / "bundle")
    assert bundle.image().shape == (1, 6, 112, 112) and bundle.image().input == "float32"
    from cobra_edge.inference.session import load

    assert np.isfinite(load(bundle).visual_embeddings(HELDOUT.parent / "heldout" / "000.png")).all()
