"""Vision runtimes: selection, the choices of an export, refusals, messages."""

import dataclasses
import errno
import json
import logging
import shutil
import subprocess
import sys

import msgspec
import pytest

from cobra_edge.bundle import hash_cache
from cobra_edge.bundle.engine_key import EngineKey
from cobra_edge.bundle.reader import MANIFEST, Bundle
from cobra_edge.errors import BundleError, InputError, MachineError
from cobra_edge.export.pipeline import export_bundle
from cobra_edge.export.vision import checked_engine, checked_precision
from cobra_edge.files import ownership
from cobra_edge.formats.targets import target_named
from cobra_edge.regress.budget import read_budget
from cobra_edge.vision import runtimes
from cobra_edge.vision.engines import device_buffers, tensorrt_rtx
from cobra_edge.vision.engines.cache import EngineCache
from cobra_edge.vision.runtimes import open_vision

KEY = EngineKey("tensorrt-rtx", "1.7.1", ("8.6",), "fp32", "0" * 64)


@pytest.fixture
def bundle(mini_bundle):
    return Bundle.open(mini_bundle("w4a16-g128"))


def _row(monkeypatch, **changes):
    row = dataclasses.replace(runtimes.RUNTIMES[0], **{"refuses": lambda bundle: None, **changes})
    monkeypatch.setattr(runtimes, "RUNTIMES", (row, runtimes.RUNTIMES[-1]))


def _raises(error):
    def call(*_arguments):
        raise error

    return call


@pytest.mark.parametrize("where", ["refuses", "open"])
@pytest.mark.parametrize("error", [MachineError("the GPU is gone"), InputError("the GPU is gone: no kernel for this graph")])
def test_a_runtime_that_fails_gives_way_to_the_next(bundle, monkeypatch, caplog, where, error):
    _row(monkeypatch, **{where: _raises(error)})
    with caplog.at_level(logging.INFO):
        assert open_vision(bundle).name == "onnxruntime, CPU"
    assert "not tensorrt-rtx: the GPU is gone" in caplog.text
    (warned,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert warned.startswith("vision: tensorrt-rtx failed, trying the next runtime: the GPU is gone")
    with pytest.raises(type(error), match="the GPU is gone"):
        open_vision(bundle, runtime="tensorrt-rtx")


def test_a_bundle_whose_engine_is_not_what_it_says_is_not_run_on_something_else(bundle, monkeypatch):
    _row(monkeypatch, open=_raises(BundleError("not its engine")))
    with pytest.raises(BundleError, match="not its engine"):
        open_vision(bundle)


def test_cuda_bindings_that_do_not_load_are_told(monkeypatch):
    monkeypatch.setattr(device_buffers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device_buffers, "_cuda", _raises(ImportError("libcudart.so.12")))
    assert "cuda-bindings cannot be used (libcudart.so.12)" in device_buffers.why_no_cuda()
    monkeypatch.setattr(device_buffers.importlib.util, "find_spec", lambda name: None)
    assert "jetpack6" in device_buffers.why_no_cuda()


# --- an export's choices ----------------------------------------------------------------------------------------------------


def test_choices_of_an_engine(monkeypatch, capsys):
    monkeypatch.setattr(tensorrt_rtx, "why_no_tensorrt_rtx", lambda: None)
    supported = ("7.5", "8.6", "8.9")
    monkeypatch.setattr(tensorrt_rtx, "supported_capabilities", lambda: supported)
    assert checked_engine(target_named("rtx-4090"), "auto", "fp16") == "embedded"
    assert checked_engine(target_named("rtx-4090"), "stripped", "fp16") == "stripped"
    assert checked_engine(target_named("rtx-4090"), "none", "fp16") == "none"
    assert checked_engine(target_named("jetson"), "auto", "fp16") == "none"
    with pytest.raises(InputError, match=r"--engine embedded: .* runs no engine that is built ahead of time"):
        checked_engine(target_named("jetson"), "embedded", "fp16")
    with pytest.raises(InputError, match="did you mean 'stripped'"):
        checked_engine(target_named("rtx"), "striped", "fp16")
    # Unsupported precisions are refused before the graph is written.
    with pytest.raises(
        InputError, match=r"--engine embedded: .* no float32 matmuls on compute capability 7.5, and int8 has some"
    ):
        checked_engine(target_named("rtx-2060"), "embedded", "int8")
    assert checked_engine(target_named("rtx-2060"), "auto", "int8") == "none"
    assert "no float32" in capsys.readouterr().err
    monkeypatch.setattr(tensorrt_rtx, "why_no_tensorrt_rtx", lambda: "it is not installed")
    assert checked_engine(target_named("rtx"), "auto", "fp16") == "none"
    assert "onnxruntime runs its graph" in capsys.readouterr().err
    with pytest.raises(MachineError, match="--engine stripped: it is not installed"):
        checked_engine(target_named("rtx"), "stripped", "fp16")


def test_precisions_that_a_target_has_not():
    assert checked_precision(target_named("jetson"), None) == "fp16"
    with pytest.raises(InputError, match=r"--vision-precision bf16: .* compute capability 8.0"):
        checked_precision(target_named("rtx-2060"), "bf16")


def test_a_budget_for_an_unknown_precision_is_refused(tmp_path):
    file = tmp_path / "budget.toml"
    file.write_text("[schemes.fp16]\n[vision.fp61]\nkld_mean = {max = 1.0}\n")
    with pytest.raises(InputError, match="fp61"):
        read_budget(file)


# --- engines' keys and cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"version": "../1"},
        {"version": ""},
        {"capabilities": ["8.6", "/../../x"]},
        {"capabilities": ["8.6\0"]},
        {"capabilities": []},
        {"capabilities": ["8.6"] * 1000},
        {"precision": "fp61"},
        {"runtime": "../tensorrt"},
        {"onnx_sha256": "\x1b[2J"},
        {"gpu": "x" * 1000},
    ],
)
def test_a_manifest_with_an_odd_engine_key_is_refused(bundle, tmp_path, change):
    shutil.copytree(bundle.directory, tmp_path / "copy")
    (tmp_path / "copy" / "engine").write_bytes(b"")
    data = json.loads((tmp_path / "copy" / MANIFEST).read_text())
    data["files"]["engine"] = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    data["engines"] = {"engine": msgspec.to_builtins(KEY)}
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(data))
    assert Bundle.open(tmp_path / "copy").manifest.engines == {"engine": KEY}
    data["engines"]["engine"] |= change
    (tmp_path / "copy" / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "copy")


def test_a_record_that_is_no_record_counts_as_none(tmp_path):
    cache = EngineCache(tmp_path)
    cache.publish(KEY, b"engine")
    assert cache.read(KEY) == b"engine"
    record = json.loads(cache.record(KEY).read_bytes())
    record["key"]["version"] = "../1"
    for content in (json.dumps(record).encode(), b"", b"[" * 100_000, b"\xff"):
        cache.record(KEY).write_bytes(content)
        assert cache.read(KEY) is None


def test_a_builder_clears_what_killed_ones_of_its_key_left(tmp_path):
    cache, other = EngineCache(tmp_path), msgspec.structs.replace(KEY, version="1.8.0")
    mine = [tmp_path / f".building-{KEY.stem}-x", tmp_path / f".partial-{KEY.stem}.engine-x"]
    theirs = tmp_path / f".partial-{other.stem}.engine-x"
    mine[0].mkdir()
    for file in (mine[0] / "plan", mine[1], theirs):
        file.write_bytes(b"half")
    with cache.locked(KEY), cache.building(KEY) as scratch:
        assert not any(f.exists() for f in mine) and theirs.exists()
        assert scratch.is_dir() and scratch.parent == tmp_path
    assert not scratch.exists()


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="cannot store an engine"), EngineCache(tmp_path / "file").locked(KEY):
        pass
    cache = EngineCache(tmp_path)
    with pytest.raises(MachineError, match="No space left"), cache.locked(KEY):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(BrokenPipeError), cache.locked(KEY):  # from the progress callback, not from the cache
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_engine_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache, hashed, real = EngineCache(tmp_path), [], hash_cache.content_sha256
    monkeypatch.setattr(hash_cache, "content_sha256", lambda *given: hashed.append(1) or real(*given))
    monkeypatch.setattr(hash_cache, "_SETTLED_NS", 0)
    cache.publish(KEY, b"engine")
    assert cache.read(KEY) == cache.read(KEY) == b"engine" and hashed == [1]
    cache.engine(KEY).write_bytes(b"enginf")
    assert cache.read(KEY) is None and hashed == [1, 1]


def test_a_text_only_model_is_judged_without_what_a_vision_graph_may_add(text_only, tmp_path):
    exported = export_bundle(str(text_only), target_named("jetson"), tmp_path / "b", scheme="fp16", golden_lines=16)
    limits = {v.measure: v.limit for v in exported.verdicts}
    scheme = read_budget().schemes["fp16"]
    assert limits == {"kld_mean": scheme["kld_mean"].max, "top1_agreement": scheme["top1_agreement"].min}
    assert read_budget().limits_of("fp16", "fp16")["top1_agreement"].min < scheme["top1_agreement"].min


def test_what_runs_on_a_device_imports_nothing_that_only_an_export_needs():
    modules = ["build", "run", "inspect", "vision.session", "vision.engines.rtx_vision", "vision.engines.tensorrt_build"]
    program = f"import sys, {', '.join('cobra_edge.' + m for m in modules)}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "onnxruntime" in loaded and not {"torch", "onnx", "timm", "tensorrt", "tensorrt_rtx"} & set(loaded)


def test_an_engine_that_another_user_could_have_written_is_none(tmp_path, monkeypatch):
    cache = EngineCache(tmp_path)
    engine, record = cache.publish(KEY, b"code"), cache.record(KEY)
    assert cache.read(KEY) == b"code"
    for file in (engine, record):
        file.chmod(0o666)
        assert cache.read(KEY) is None
        file.chmod(0o600)
        assert cache.read(KEY) == b"code"
        moved = file.rename(tmp_path / "moved")
        file.symlink_to(moved)
        assert cache.read(KEY) is None
        moved.rename(file)
    monkeypatch.setattr(ownership, "_trusted_users", lambda: {54321})
    assert cache.read(KEY) is None
