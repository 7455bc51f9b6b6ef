"""TensorRT engines, with fakes: see fake_tensorrt and fake_cuda for what that verifies and what not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from cobra_edge import build
from cobra_edge.bundle.manifest import VisionGraph
from cobra_edge.bundle.reader import MANIFEST, VISION, Bundle, file_entries
from cobra_edge.errors import BundleError, MachineError
from cobra_edge.terminal.output import run_command, stages
from cobra_edge.vision import runtimes
from cobra_edge.vision.engines import device_buffers, tensorrt, tensorrt_build, tensorrt_job, tensorrt_library, tensorrt_memory
from cobra_edge.vision.engines.cache import EngineCache
from cobra_edge.vision.session import VisionSession

from .. import fake_cuda
from ..tolerance import assert_close
from . import fake_tensorrt

ROOT = Path(__file__).parents[2]
VERSIONS = ("10.3.0", "10.16.1.11", "11.4.1.9")


@dataclass
class Device:
    """A machine with fakes in place of NVIDIA's packages."""

    folder: Path
    patch: pytest.MonkeyPatch

    def tensorrt(self, version: str) -> None:
        """Install a version; None was there before."""
        text = f"from tests.vision import fake_tensorrt\nfake_tensorrt.install(globals(), {version!r})\n"
        (self.folder / "tensorrt.py").write_text(text)
        # For a file of the same length within a second Python would use its bytecode cache.
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)
        sys.modules.pop("tensorrt", None)  # not by the patch, which would restore an earlier fake at the end

    def gpu(self, text: str) -> None:
        self.patch.setenv("FAKE_GPU", text)

    def behave(self, how: str) -> None:
        self.patch.setenv("FAKE_BUILD", how)

    @property
    def builds(self) -> list[dict[str, int]]:
        log = self.folder / "builds"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    folder = tmp_path / "device"
    (folder / "cuda" / "bindings").mkdir(parents=True)
    (folder / "cuda" / "bindings" / "__init__.py").touch()
    (folder / "cuda" / "bindings" / "runtime.py").write_text("from tests import fake_cuda\nfake_cuda.install(globals())\n")
    for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", "cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setenv("FAKE_BUILDS", str(folder / "builds"))
    monkeypatch.setenv("FAKE_GPU", fake_cuda.ORIN_NANO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tensorrt_memory, "available_bytes", lambda: 6_000_000_000)
    fake_cuda.memory.clear()
    fake_cuda.streams.clear()
    made = Device(folder, monkeypatch)
    made.tensorrt("10.3.0")
    yield made
    for name in [n for n in sys.modules if n.split(".")[0] in ("tensorrt", "cuda")]:
        del sys.modules[name]


@pytest.fixture
def path(mini_bundle: Callable[..., Path]) -> Path:
    return mini_bundle("w4a16-g128", vision_precision="fp32", vision_input="float32")


def edited(path: Path, copy: Path, **changes: Any) -> Path:
    """Copy a bundle with a changed manifest and updated hashes."""
    shutil.copytree(path, copy)
    manifest = Bundle.open(path).manifest
    manifest = msgspec.structs.replace(manifest, **{"files": file_entries(copy), **changes})
    (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return copy


def other_graph(path: Path, copy: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Copy a bundle with a changed graph and an updated manifest."""
    shutil.copytree(path, copy)
    graph = onnx.load(copy / VISION)
    change(graph)
    onnx.save(graph, copy / VISION)
    manifest = msgspec.structs.replace(Bundle.open(path).manifest, files=file_entries(copy))
    (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return copy


def built(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run_command(build.command, [str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def leftovers() -> list[str]:
    """Return the files in the engine cache except locks."""
    return sorted(f.name for f in EngineCache().directory.glob("*") if f.suffix != ".lock")


def pixels(bundle: Bundle) -> np.ndarray:
    vision = bundle.manifest.model.vision
    assert vision is not None
    shape = (1, 3 * len(vision.encoders), vision.image_size, vision.image_size)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engine_computes_what_the_graph_computes(device: Device, path: Path, version: str) -> None:
    device.tensorrt(version)
    bundle = Bundle.open(path)
    runner = runtimes.open_vision(bundle, "cuda", "tensorrt")
    assert runner.name == f"TensorRT {version}, Orin"
    expected = VisionSession(bundle.path(VISION), bundle.manifest.model)
    for given in (pixels(bundle), pixels(bundle)[:, :, ::-1]):  # the second strided
        assert_close(runner.embed(given), expected.embed(np.ascontiguousarray(given)), "vision")
    runner.close()
    assert not fake_cuda.memory and not fake_cuda.streams
    assert len(device.builds) == 1


def test_embeddings_stay_on_the_gpu_on_the_decoders_stream(device: Device, path: Path) -> None:
    bundle = Bundle.open(path)
    config, given = bundle.manifest.model, pixels(bundle)
    runner = runtimes.open_vision(bundle, "cuda", "tensorrt")
    on_gpu = runtimes.gpu_vision(runner)
    assert on_gpu is not None
    stream = device_buffers.Stream()
    room = device_buffers.DeviceBuffer((config.n_visual_tokens, config.mamba.d_model), np.float32)
    on_gpu.embed_into(given, room.address, stream.handle)
    got = np.empty(room.shape, np.float32)
    room.copy_out(got, stream)
    assert np.isnan(fake_cuda.memory[room.address].view(np.float32)).all()  # the work is only enqueued
    stream.synchronize()
    assert_close(got, VisionSession(path / VISION, config).embed(given), "vision")
    assert np.array_equal(runner.embed(given), got)
    with pytest.raises(MachineError, match="TensorRT: setting the address of embeddings failed"):
        on_gpu.embed_into(given, 1, stream.handle)
    runner.close()
    assert fake_cuda.memory.keys() == {room.address} and fake_cuda.streams.keys() == {stream.handle}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_what_ships_runs_too_with_images_as_they_are(device: Device, mini_bundle: Callable[..., Path], precision: str) -> None:
    bundle = Bundle.open(mini_bundle("w4a16-g128", vision_precision=precision))
    runner, expected = runtimes.open_vision(bundle), runtimes.open_vision(bundle, "cpu")
    image = np.random.default_rng(0).integers(0, 256, bundle.image().shape, np.uint8)
    assert runner.name.startswith("TensorRT 10.3") and expected.name == "onnxruntime, CPU"
    # the fake's session has onnxruntime's own options, and 1.22 rounds a float16 graph otherwise there
    dtype = "float16" if precision == "fp16" else "float32"
    assert_close(runner.embed(image), expected.embed(image), "vision", dtype)
    runner.close()


def test_auto_takes_tensorrt_where_it_is_and_onnxruntime_where_not(device: Device, path: Path) -> None:
    bundle = Bundle.open(path)
    assert runtimes.open_vision(bundle).name.startswith("TensorRT")
    assert isinstance(runtimes.open_vision(bundle, "cpu"), VisionSession)
    device.gpu("")
    assert isinstance(runtimes.open_vision(bundle), VisionSession)


def test_the_command_builds_once_and_tells_what(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = built(path, capsys)
    assert Path(first["file"]).stat().st_size == first["bytes"] > 0
    assert first["seconds"] > 0 and first["key"]["capabilities"] == ["8.7"] and first["key"]["version"] == "10.3.0"
    assert first["key"]["gpu"] == "Orin, 8 multiprocessors"
    again = built(path, capsys)
    assert again == {**first, "seconds": None, "workspace_bytes": None}
    assert len(device.builds) == 1
    assert built(path, capsys, "--force")["seconds"] is not None
    assert len(device.builds) == 2
    assert run_command(build.command, [str(path)]) == 0
    said = capsys.readouterr().out
    assert "found in the cache" in said and "8.7" in said and "10.3.0" in said


def test_the_first_start_says_how_long_it_takes(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Bundle.open(path)
    runtimes.open_vision(bundle, "cuda", "tensorrt")
    told = capsys.readouterr()
    assert "several minutes" in told.err and str(EngineCache().directory) in told.err and not told.out
    runtimes.open_vision(bundle, "cuda", "tensorrt")
    assert capsys.readouterr().err == ""


def test_another_directory_for_the_engine(
    device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = built(path, capsys, "--cache", str(tmp_path / "elsewhere"))
    assert Path(made["file"]).parent == tmp_path / "elsewhere"
    assert not EngineCache().directory.exists()


CHANGES: dict[str, Callable[[Device], None]] = {
    "another version": lambda d: d.tensorrt("10.7.0"),
    "another capability": lambda d: d.gpu("Thor;11.0;8e9;6000000000;20;1".replace("8e9", "8000000000")),
    "another size of GPU": lambda d: d.gpu(fake_cuda.ORIN_NANO.replace(";8;1", ";16;1")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_for_something_else_is_not_used(
    device: Device, path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    first = built(path, capsys)
    CHANGES[change](device)
    second = built(path, capsys)
    assert second["file"] != first["file"] and second["seconds"] is not None
    assert runtimes.open_vision(Bundle.open(path), "cuda", "tensorrt").embed(pixels(Bundle.open(path))).shape
    assert len(device.builds) == 2


def test_another_graph_gets_another_engine(
    device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        graph.graph.name = "another"

    first, second = built(path, capsys), built(other_graph(path, tmp_path / "other", rename), capsys)
    assert first["file"] != second["file"]
    assert [b["known"] for b in device.builds] == [0, 1]  # the second build uses the timings of the first


@pytest.mark.parametrize("damage", ["cut", "flipped", "no record"])
def test_a_damaged_engine_is_built_again(device: Device, path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    file = Path(built(path, capsys)["file"])
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-1])
    elif damage == "flipped":
        file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    else:
        file.with_suffix(".json").unlink()
    assert built(path, capsys)["seconds"] is not None
    assert file.read_bytes() == whole and len(device.builds) == 2


def test_an_engine_that_tensorrt_does_not_read_is_built_again(
    device: Device, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As after a patch of TensorRT that keeps its version: key, size and hash match.
    bundle = Bundle.open(path)
    key = tensorrt_build.engine_key(bundle, tensorrt.first_gpu())
    EngineCache().publish(key, b"written by another patch")
    runner = runtimes.open_vision(bundle, "cuda", "tensorrt")
    assert "cannot read the engine" in capsys.readouterr().err
    assert runner.embed(pixels(bundle)).shape and len(device.builds) == 1


@pytest.mark.parametrize("damage", [b"", b"0123456789", b"0" * 32 + fake_tensorrt.TIMING_MAGIC])
def test_damaged_times_are_ignored(device: Device, path: Path, capsys: pytest.CaptureFixture[str], damage: bytes) -> None:
    built(path, capsys)
    built(path, capsys, "--force")
    (times,) = EngineCache().directory.glob("timings-*")
    times.write_bytes(damage)
    built(path, capsys, "--force")
    built(path, capsys, "--force")
    assert [b["known"] for b in device.builds] == [0, 1, 0, 1]


def test_times_that_tensorrt_does_not_want_are_ignored(device: Device, tmp_path: Path) -> None:
    config = fake_tensorrt.Config(owner := fake_tensorrt.Made(), _Api("10.3.0"))
    assert tensorrt_job._timings(config, b"not a cache").serialize().startswith(fake_tensorrt.TIMING_MAGIC)
    other = fake_tensorrt.TIMING_MAGIC + b"10.2.0 Orin\nx\n"
    assert b"10.3.0" in tensorrt_job._timings(config, other).serialize()
    assert owner is not None


@dataclass
class _Api:
    version: str


def test_two_processes_build_one_engine(device: Device, path: Path) -> None:
    device.behave("slow")
    command = [sys.executable, "-m", "cobra_edge.build", str(path), "--json"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0]
    seconds = [json.loads(out)["seconds"] for out, _ in ended]
    assert sorted(s is None for s in seconds) == [False, True]
    waited = ended[seconds.index(None)][1]
    assert "another process builds this engine" in waited
    assert len(device.builds) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(device: Device, path: Path, number: int) -> None:
    device.behave("hang")
    command = [sys.executable, "-m", "cobra_edge.build", str(path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not device.builds:
        assert parent.poll() is None, parent.stderr
        time.sleep(0.05)
    time.sleep(0.3)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=20)
    assert parent.returncode == 130 and "interrupted" in err and out == ""
    assert leftovers() == []
    assert not _runs(device.builds[0]["pid"])
    device.behave("")
    assert run_command(build.command, [str(path)]) == 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_a_killed_build_left_is_cleared_away(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device.behave("hang")
    parent = subprocess.Popen([sys.executable, "-m", "cobra_edge.build", str(path)], stderr=subprocess.DEVNULL)
    while not device.builds:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    os.kill(device.builds[0]["pid"], signal.SIGKILL)
    assert len(leftovers()) == 1
    device.behave("")
    built(path, capsys)
    assert not [name for name in leftovers() if name.startswith(".")]


def test_a_builder_stops_when_nobody_listens(device: Device, path: Path, tmp_path: Path) -> None:
    job = tensorrt_job.Job(str(path / VISION), str(tmp_path), 1 << 20)
    job.timing.write_bytes(b"")
    assert "could not build the engine" in str(tensorrt_job.build(job, lambda message: False))
    assert not job.plan.exists()
    told: list[tensorrt_job.Message] = []
    assert tensorrt_job.build(job, lambda message: told.append(message) is None) is None
    phases = [m for m in told if isinstance(m, tensorrt_job.Phase)]
    assert {p.name for p in phases} == {"Building the engine", "Timing kernels"}
    assert phases[0] == tensorrt_job.Phase("Building the engine", 0, 2)


def test_a_tensorrt_without_the_flag_of_strong_types(
    device: Device, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.tensorrt("11.4.1.9")
    job = tensorrt_job.Job(str(path / VISION), str(tmp_path), 1 << 20)
    job.timing.write_bytes(b"")
    monkeypatch.setattr(tensorrt_library.tensorrt(), "NetworkDefinitionCreationFlag", fake_tensorrt.enum.IntEnum("none", {}))
    builder: Any = tensorrt_library.tensorrt().Builder
    monkeypatch.setattr(builder._api, "NetworkDefinitionCreationFlag", fake_tensorrt.enum.IntEnum("none", {}))
    assert tensorrt_job.build(job, lambda message: True) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_explicit_int8_is_built_strongly_typed(device: Device, path: Path, tmp_path: Path, version: str) -> None:
    def quantize(graph: onnx.ModelProto) -> None:
        scale = onnx.numpy_helper.from_array(np.float32(0.05), "qdq_scale")
        zero = onnx.numpy_helper.from_array(np.int8(0), "qdq_zero")
        graph.graph.initializer.extend([scale, zero])
        for node in graph.graph.node:
            node.input[:] = ["rounded" if i == "pixels" else i for i in node.input]
        pair = [
            onnx.helper.make_node("QuantizeLinear", ["pixels", "qdq_scale", "qdq_zero"], ["codes"]),
            onnx.helper.make_node("DequantizeLinear", ["codes", "qdq_scale", "qdq_zero"], ["rounded"]),
        ]
        for node in reversed(pair):
            graph.graph.node.insert(0, node)

    device.tensorrt(version)
    copy = other_graph(path, tmp_path / "int8", quantize)
    bundle = Bundle.open(edited(copy, tmp_path / "named", vision=VisionGraph("int8")))
    runner = runtimes.open_vision(bundle, "cuda", "tensorrt")
    assert_close(
        runner.embed(pixels(bundle)), VisionSession(copy / VISION, bundle.manifest.model).embed(pixels(bundle)), "vision"
    )
    (engine,) = EngineCache().directory.glob("*.engine")
    assert "-int8-" in engine.name


def test_the_workspace_is_what_the_plan_leaves(device: Device, path: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(path)
    plan, weights = bundle.manifest.memory_plan, tensorrt_memory.graph_bytes(bundle)
    assert plan.available_bytes is not None
    others = plan.vision_bytes + plan.decoder_bytes + plan.state_bytes + plan.buffer_bytes + plan.reserved_bytes
    assert tensorrt_memory.workspace_bytes(bundle, 64_000_000_000) == plan.available_bytes - others
    assert tensorrt_memory.workspace_bytes(bundle, 1_000_000_000) == 1_000_000_000 - 2 * weights
    open_ended = msgspec.structs.replace(plan, available_bytes=None)
    elsewhere = Bundle.open(edited(path, tmp_path / "cpu", memory_plan=open_ended))
    assert tensorrt_memory.workspace_bytes(elsewhere, 64_000_000_000) == 64_000_000_000 - 2 * weights


# Refusals, one test each.


def refused(path: Path, capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert run_command(build.command, [str(path)]) == code
    told = capsys.readouterr()
    assert told.out == "" and "Traceback" not in told.err
    return told.err


def test_no_tensorrt(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (device.folder / "tensorrt.py").unlink()
    sys.modules.pop("tensorrt", None)
    said = refused(path, capsys, 3)
    assert "not installed" in said and "nvidia-jetpack" in said and "--system-site-packages" in said
    with pytest.raises(MachineError, match="TensorRT is not installed"):
        runtimes.open_vision(Bundle.open(path), "cuda", "tensorrt")


def test_a_tensorrt_that_cannot_be_loaded(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (device.folder / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    shutil.rmtree(device.folder / "__pycache__", ignore_errors=True)
    assert "libnvinfer.so.10" in refused(path, capsys, 3)


@pytest.mark.parametrize("version", ["8.6.2", "10.2.0"])
def test_a_tensorrt_that_is_too_old(device: Device, path: Path, capsys: pytest.CaptureFixture[str], version: str) -> None:
    device.tensorrt(version)
    assert f"TensorRT is {version}, 10.3 or later" in refused(path, capsys, 3)


def test_no_gpu(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device.gpu("")
    assert "no CUDA-capable device is detected" in refused(path, capsys, 3)


def test_a_gpu_too_old_for_the_precision(
    device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = edited(path, tmp_path / "bf16", vision=VisionGraph("bf16"))
    device.gpu("Xavier;7.2;8000000000;6000000000;8;1")
    said = refused(copy, capsys, 3)
    assert "bf16 needs a GPU of compute capability 8.0 or later, Xavier has 7.2" in said and not device.builds


def test_too_little_memory(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tensorrt_memory.graph_bytes(Bundle.open(path))
    needed = 2 * weights + (64 << 20)
    device.patch.setattr(tensorrt_memory, "available_bytes", lambda: needed - 1)
    device.gpu(f"Orin;8.7;7990000000;{needed - 1};8;1")
    said = refused(path, capsys, 3)
    assert f"at least {needed / 1e9:.2f} GB" in said and f"{(needed - 1) / 1e9:.2f} GB are free" in said
    assert not device.builds and not leftovers()
    assert isinstance(runtimes.open_vision(Bundle.open(path)), VisionSession)
    # On a Jetson reclaimable page cache counts as free; with a discrete GPU the smaller of both memories.
    device.patch.setattr(tensorrt_memory, "available_bytes", lambda: needed)
    device.gpu(f"Orin;8.7;7990000000;{needed - 1};8;0")
    refused(path, capsys, 3)
    device.gpu(f"Orin;8.7;7990000000;{needed - 1};8;1")
    assert built(path, capsys)["workspace_bytes"] == 64 << 20


def test_too_little_disk(device: Device, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(path)
    device.patch.setattr(shutil, "disk_usage", lambda directory: usage._replace(free=1000))
    said = refused(path, capsys, 3)
    assert "0.00 GB free" in said and "--cache" in said and not device.builds


def test_an_edited_graph(device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(path, capsys)
    copy = shutil.copytree(path, tmp_path / "copy")
    content = bytearray((copy / VISION).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / VISION).write_bytes(content)
    said = refused(copy, capsys, 2)
    assert VISION in said and "sha256 differs" in said and len(device.builds) == 1


def test_a_model_without_vision(device: Device, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "text-only" in refused(tiny_bundle, capsys, 2)
    with pytest.raises(BundleError):
        tensorrt_build.engine_of(Bundle.open(tiny_bundle), EngineCache(), stages, print)


def test_a_graph_that_tensorrt_cannot_read(
    device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / VISION).write_bytes(b"\xff not a graph")
    assert "unexpected protobuf" in refused(_vouched(copy), capsys, 2) and not _engines()  # TensorRT is not even asked
    monkeypatch.setattr("cobra_edge.bundle.reader.require_plain_graph", lambda *_: None)
    said = refused(_vouched(copy), capsys, 3)
    assert "TensorRT 10.3.0 cannot parse" in said and "another --vision-precision" in said and not _engines()


def _vouched(copy: Path) -> Path:
    manifest = msgspec.json.decode((copy / MANIFEST).read_bytes())
    manifest["files"] = msgspec.to_builtins(file_entries(copy))
    (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return copy


def _engines() -> list[Path]:
    return list(EngineCache().directory.glob("*.engine"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nothing", ("could not build the engine", "no kernel fits the workspace")),
        ("killed", ("was killed", "memory ran out")),
        ("crash", ("SIGABRT", "an illegal memory access")),
    ],
)
def test_a_builder_that_fails(
    device: Device, path: Path, capsys: pytest.CaptureFixture[str], how: str, words: tuple[str, ...]
) -> None:
    device.behave(how)
    said = refused(path, capsys, 3)
    assert all(word in said for word in words), said
    assert leftovers() == []


@pytest.mark.parametrize(("script", "says"), [("exit 3", "code 3"), ("printf '{\"type'; kill -9 $$", "was killed")])
def test_a_builder_that_ends_before_it_is_asked_or_in_the_middle_of_a_word(
    device: Device, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, says: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    device.patch.setattr(sys, "executable", str(python))
    assert says in refused(path, capsys, 3)
    assert leftovers() == []


def test_an_engine_of_another_shape(device: Device, path: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(path)
    wanted = msgspec.structs.replace(bundle.manifest, vision=VisionGraph(input="uint8"))
    built = tensorrt_build.engine_of(bundle, EngineCache(), stages, print)
    data = EngineCache().read(built.key)
    assert data is not None
    with pytest.raises(tensorrt.UnreadableEngineError, match="expected"):
        tensorrt.TensorRTRunner(data, Bundle(bundle.directory, wanted))


def test_no_memory_on_the_gpu_to_run(device: Device, path: Path) -> None:
    runtimes.open_vision(Bundle.open(path), "cuda", "tensorrt")
    device.gpu("Orin;8.7;7990000000;1000;8;1")
    held = len(fake_cuda.memory), len(fake_cuda.streams)
    with pytest.raises(MachineError, match="allocating"):
        runtimes.open_vision(Bundle.open(path), "cuda", "tensorrt")
    assert (len(fake_cuda.memory), len(fake_cuda.streams)) == held


# The fakes themselves: they must enforce the order of calls.


def test_the_fake_wants_the_order_of_calls(device: Device, path: Path) -> None:
    trt = tensorrt_library.tensorrt()
    logger = tensorrt_library.listener()
    builder = trt.Builder(logger)
    network, config = builder.create_network(2), builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1)
    with pytest.raises(fake_tensorrt.OrderError, match="nothing was parsed"):
        builder.build_serialized_network(network, config)
    assert trt.OnnxParser(network, logger).parse_from_file(str(path / VISION))
    with pytest.raises(fake_tensorrt.OrderError, match="monitor"):
        builder.build_serialized_network(network, config)
    config.progress_monitor = tensorrt_job.monitor(lambda message: True)
    config.set_flag(trt.BuilderFlag.FP16)
    assert builder.build_serialized_network(network, config) is None and "strongly typed" in logger.heard[-1]
    del builder
    with pytest.raises(fake_tensorrt.OrderError, match="after its Builder was deleted"):
        config.clear_flag(trt.BuilderFlag.FP16)


def test_the_fake_computes_only_when_it_is_waited_for(device: Device, path: Path) -> None:
    bundle = Bundle.open(path)
    runner = runtimes.open_vision(bundle, "cuda", "tensorrt")
    runner._run._stream.synchronize = lambda: None
    assert not np.array_equal(
        runner.embed(pixels(bundle)), VisionSession(path / VISION, bundle.manifest.model).embed(pixels(bundle))
    )
    fresh = runner._engine.create_execution_context()
    with pytest.raises(fake_tensorrt.OrderError, match="address"):
        fresh.execute_async_v3(runner._run._stream.handle)
