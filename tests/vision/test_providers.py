"""onnxruntime's execution providers: which is selected, and why each better one was not."""

import logging

import numpy as np
import onnxruntime
import pytest

from cobra_edge.bundle.reader import VISION, Bundle
from cobra_edge.errors import BundleError, MachineError
from cobra_edge.vision import session as vision_session
from cobra_edge.vision.providers import PROVIDERS, eligible, provider_options
from cobra_edge.vision.runtimes import gpu_vision, open_vision
from cobra_edge.vision.session import VisionSession

from ..tolerance import assert_close

RTX, TENSORRT, CUDA, CPU = PROVIDERS


@pytest.fixture
def bundle(mini_bundle):
    return Bundle.open(mini_bundle("w4a16-g128"))


@pytest.fixture
def built_in(monkeypatch):
    """Pretend that onnxruntime was built with these providers in addition to the CPU's."""

    def pretend(*providers):
        names = [p.name for p in providers] + [CPU.name]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)

    return pretend


class Binding:
    """onnxruntime's binding, with host memory in place of a GPU's; `waits` counts synchronizations of all instances."""

    waits = 0

    def __init__(self, real):
        self.real = real

    def bind_output(self, name, device, number, dtype, shape, address):
        if address == BAD_ADDRESS:
            raise RuntimeError("an illegal memory access was encountered")
        assert (device, number) in (("cuda", 0), ("cpu", 0))
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)

    def synchronize_outputs(self):
        Binding.waits += 1

    def __getattr__(self, name):
        return getattr(self.real, name)


BAD_ADDRESS = 4096


@pytest.fixture
def on_gpu(monkeypatch):
    """Open sessions of GPU providers on the CPU, or raise the given errors; returns the requests."""
    real, asked = onnxruntime.InferenceSession, []

    def pretend(broken=None, silent=()):
        class Session:
            def __init__(self, file, options, providers, enable_fallback):
                asked.append(providers)
                name = providers[0][0]
                if broken and name in broken:
                    raise RuntimeError(broken[name])
                self._own = CPU.name if name in silent else name
                self._real = real(file, options, providers=[CPU.name])

            def get_providers(self):
                return [self._own, CPU.name]

            def __getattr__(self, name):
                return getattr(self._real, name)

            def io_binding(self):
                return Binding(self._real.io_binding())

            def run_with_iobinding(self, binding):
                self._real.run_with_iobinding(binding.real)

        monkeypatch.setattr(vision_session.onnxruntime, "InferenceSession", Session)
        return asked

    return pretend


def test_the_table_prefers_engines_then_cuda_then_the_processor(built_in):
    built_in(CUDA, TENSORRT, RTX)
    assert eligible("auto") == ([RTX, TENSORRT, CUDA, CPU], [])
    takes, reasons = eligible("cuda")
    assert takes == [RTX, TENSORRT, CUDA] and reasons == ["CPU: runs on cpu, cuda was requested"]
    built_in()
    takes, reasons = eligible("auto")
    assert takes == [CPU] and [r.split(":")[0] for r in reasons] == ["TensorRT for RTX", "TensorRT", "CUDA"]
    assert "it comes with onnxruntime-gpu" in reasons[2]


def test_each_better_one_is_logged_with_its_reason(bundle, built_in, on_gpu, caplog):
    built_in(TENSORRT, CUDA)
    on_gpu(broken={TENSORRT.name: "libnvinfer.so.10 not found"}, silent=(CUDA.name,))
    with caplog.at_level(logging.INFO):
        runner = open_vision(bundle, runtime="onnxruntime")
    assert runner.name == "onnxruntime, CPU"
    said = [r.getMessage() for r in caplog.records if r.name == "cobra_edge.vision.session"]
    assert [line.partition(":")[2].strip() for line in said] == [
        "not on TensorRT for RTX: this onnxruntime does not include it; "
        "it comes with a build of onnxruntime with TensorRT for RTX",
        "not on TensorRT: libnvinfer.so.10 not found",
        "not on CUDA: its libraries do not load here",
    ]


def test_on_a_gpu_the_output_is_bound_once_and_written_again(bundle, built_in, on_gpu):
    built_in(CUDA)
    asked = on_gpu()
    runner = open_vision(bundle, "cuda", "onnxruntime")
    assert runner.name == "onnxruntime, CUDA"
    assert asked == [[(CUDA.name, {"use_tf32": "0"}), (CPU.name, {})]]  # operators without a GPU kernel run on the CPU
    expected = VisionSession(bundle.path(VISION), bundle.manifest.model, "uint8", precision="fp16")
    images = np.random.default_rng(0).integers(0, 256, (2, *bundle.image().shape), np.uint8)
    seen = [runner.embed(p) for p in images]
    for got, image in zip(seen, images, strict=True):  # the first was not overwritten by the second
        assert_close(got, expected.embed(image), "vision")
    assert_close(runner.embed(images[0][:, :, ::-1]), expected.embed(images[0][:, :, ::-1].copy()), "vision")


STREAM = 94_034_000_128


@pytest.mark.parametrize(("opened_on", "waits"), [(STREAM, 0), (STREAM + 1, 1), (None, 1), (0, 1)])
def test_embeddings_stay_on_the_gpu_and_another_stream_is_waited_for(bundle, built_in, on_gpu, monkeypatch, opened_on, waits):
    built_in(CUDA)
    on_gpu()
    runner = open_vision(bundle, "cuda", "onnxruntime", stream=opened_on)
    monkeypatch.setattr(Binding, "waits", 0)
    config = bundle.manifest.model
    images = np.random.default_rng(0).integers(0, 256, (2, *bundle.image().shape), np.uint8)
    rooms = np.full((2, config.n_visual_tokens, config.mamba.d_model), np.nan, np.float32)
    for image, room in zip(images, rooms, strict=True):
        gpu_vision(runner).embed_into(image, room.ctypes.data, STREAM)
    assert Binding.waits == 2 * waits
    expected = VisionSession(bundle.path(VISION), config, "uint8", precision="fp16")
    for image, room in zip(images, rooms, strict=True):
        assert_close(room, expected.embed(image), "vision")
    before = rooms.copy()
    assert np.array_equal(runner.embed(images[0]), rooms[0])  # as an array it is a copy of its own
    runner.embed(images[1])
    assert np.array_equal(rooms, before)


def test_a_gpu_works_on_the_decoders_stream_and_a_processor_has_none(bundle, built_in, on_gpu):
    built_in(CUDA)
    asked = on_gpu()
    open_vision(bundle, "cuda", "onnxruntime", stream=STREAM)
    stream = {"has_user_compute_stream": "1", "user_compute_stream": str(STREAM)}
    assert asked == [[(CUDA.name, {"use_tf32": "0", **stream}), (CPU.name, {})]]
    for provider in (RTX, TENSORRT):
        options = provider_options(provider, "fp16", "/c", STREAM)
        assert options == {**provider_options(provider, "fp16", "/c"), **stream}
    assert provider_options(CUDA, "fp16", "/c", 0) == {"use_tf32": "0"}  # onnxruntime takes 0 for no stream
    assert provider_options(CPU, "fp16", "/c", STREAM) == {}
    assert gpu_vision(open_vision(bundle, "cpu", stream=STREAM)) is None


def test_a_run_that_fails_on_the_gpu_is_told(bundle, built_in, on_gpu):
    built_in(CUDA)
    on_gpu()
    runner = open_vision(bundle, "cuda", "onnxruntime", stream=STREAM)
    image = np.zeros(bundle.image().shape, np.uint8)
    with pytest.raises(MachineError, match="onnxruntime, CUDA: running the graph failed: an illegal memory access"):
        gpu_vision(runner).embed_into(image, BAD_ADDRESS, STREAM)
    assert runner.embed(image).shape == (64, 256)
    runner.close()
    assert gpu_vision(runner) is None


def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error(bundle, built_in):
    built_in()
    with pytest.raises(MachineError, match=r"CUDA: this onnxruntime does not include it; it comes with onnxruntime-gpu"):
        open_vision(bundle, "cuda", "onnxruntime")


@pytest.mark.parametrize("gpus", [(), (CUDA,)])
def test_a_broken_graph_is_the_bundles_fault_and_not_the_machines(bundle, built_in, on_gpu, tmp_path, gpus):
    built_in(*gpus)
    on_gpu()
    (tmp_path / "vision.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="onnxruntime cannot open it"):
        VisionSession(tmp_path / "vision.onnx", bundle.manifest.model, "uint8", device="auto")


def test_engines_that_onnxruntime_builds_are_kept_and_take_the_graphs_types():
    assert provider_options(TENSORRT, "fp16", "/c")["trt_fp16_enable"] == "1"
    assert "trt_fp16_enable" not in provider_options(TENSORRT, "fp32", "/c")
    assert provider_options(TENSORRT, "int8", "/c") == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/c",
        "trt_int8_enable": "1",
    }
    assert provider_options(RTX, "fp16", "/c") == {"nv_runtime_cache_path": "/c"}
    assert provider_options(CPU, "fp16", "/c") == {}
