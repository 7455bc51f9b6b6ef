"""What goes wrong on a GPU: refusals before work, and an error at every single call of the driver."""

import ctypes
import re
import subprocess
import sys

import numpy as np
import pytest

from cobra_edge.decode.cuda import library
from cobra_edge.decode.cuda.calls import driver, refusal
from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.device import first_gpu, why_no_gpu
from cobra_edge.decode.sampling import GREEDY, Sampling
from cobra_edge.environment import available_memory
from cobra_edge.environment.requirements import install_hint
from cobra_edge.errors import DeviceLostError, InputError, MachineError
from cobra_edge.formats.model_config import MambaConfig

from .driver import ORIN_NANO, RTX_4090, write_kernels
from .weights import random_weights

OUT_OF_MEMORY, UNKNOWN, ILLEGAL_ADDRESS, BAD_IMAGE, BAD_PTX = 2, 999, 700, 209, 222
SMALL = MambaConfig(32, 1, 64, 32, 4, 4, 8)
# These are made on the way out, where nobody waits for an answer.
GIVING_BACK = {"cuMemFree_v2", "cuMemFreeHost", "cuGraphDestroy", "cuGraphExecDestroy"}


def small_weights(config=SMALL):
    return random_weights(config, "w4a16-g32", "both")


def use(weights):
    """Do everything that a decoder does, once."""
    decoder = CudaDecoder(weights)
    state = decoder.new_state()
    room = decoder.embedding_room(3)
    logits = decoder.prefill(decoder.embed([1, 2, 3]), state)
    decoder.forward(room, state.copy())
    for sampling in (GREEDY, Sampling(1.0)):
        logits = decoder.step(4, state)
        tokens = list(decoder.generate(logits, state, -1, 2, sampling))
    return tokens, state.host()


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, UNKNOWN])
def test_an_error_at_every_call_of_the_driver(gpu, code):
    """Is told in words of ours, leaves nothing behind, and does no harm to the next decoder."""
    weights, told = small_weights(), set()
    gpu.plug_in()
    gpu.run_no_kernels()
    use(weights)
    for nth in range(1, gpu.calls + 1):
        gpu.plug_in()
        gpu.run_no_kernels()
        gpu.fail(nth, code)
        try:
            use(weights)
        except MachineError as error:
            told.add(re.sub(r"\d[\d.]*", "N", str(error)))
        else:
            assert gpu.failed_call in GIVING_BACK | {"cuCtxSetCurrent"}, (
                nth,
                gpu.failed_call,
            )  # which comes before one of them
        assert gpu.failed_call in GIVING_BACK or gpu.in_use == 0, (nth, gpu.failed_call)
        use(weights)
    assert len(told) > 10 and all(re.search("GPU|driver|no room", text) for text in told), told


def test_an_error_that_stays(gpu):
    decoder = CudaDecoder(small_weights())
    state = decoder.new_state()
    gpu.fail(1, ILLEGAL_ADDRESS, "cuGraphLaunch")
    with pytest.raises(MachineError, match="reading a token: .*start again"):
        decoder.step(1, state)
    for again in (lambda: decoder.step(1, state), lambda: decoder.new_state(), lambda: CudaDecoder(small_weights())):
        with pytest.raises(MachineError, match="start again"):
            again()


def test_memory_that_runs_out_later(gpu):
    decoder = CudaDecoder(small_weights())
    state = decoder.new_state()
    expected = decoder.step(1, decoder.new_state())
    gpu.fail(1, OUT_OF_MEMORY, "cuMemAlloc_v2")
    with pytest.raises(
        MachineError, match=r"reading 3 tokens: NVIDIA GeForce RTX 4090 has no room; the decoder of a small decoder"
    ):
        decoder.prefill(np.zeros((3, 32), np.float32), state)
    assert state.n_tokens == 0
    assert np.array_equal(decoder.step(1, state), expected)  # and it goes on


class TestRefusals:
    def test_none_with_a_gpu(self, gpu):
        assert why_no_gpu() is None

    def test_no_driver(self, gpu, monkeypatch):
        def missing(name):
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", missing)
        assert "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)" in why_no_gpu()

    def test_no_bindings(self, gpu, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert why_no_gpu() == f"cuda-bindings is not installed ({install_hint('cuda')}; on a Jetson [jetpack6] or [jetpack7])"

    def test_no_gpu(self, gpu, monkeypatch):
        gpu.plug_in("")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert why_no_gpu() == "there is a driver, but it sees no GPU; nvidia-smi says what it sees"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert "sees no GPU (CUDA_VISIBLE_DEVICES is '7')" in why_no_gpu()

    def test_an_old_driver(self, gpu):
        gpu.plug_in(RTX_4090.replace("13000", "11080"))
        assert "too old: it knows CUDA 11.8, 12.0 or later is needed" in why_no_gpu()

    def test_an_old_gpu(self, gpu):
        gpu.plug_in(RTX_4090.replace("8.9", "7.5"))
        assert "RTX 4090 (7.5) has too low a compute capability, 8.0 or later is needed" in why_no_gpu()

    def test_a_driver_that_fails(self, gpu):
        gpu.fail(1, UNKNOWN)
        assert "failed on the GPU" in why_no_gpu()

    def test_no_kernels(self, gpu, monkeypatch):
        monkeypatch.setattr(library, "kernels_file", lambda: None)
        assert "-DCOBRA_CUDA=OFF" in why_no_gpu()
        with pytest.raises(MachineError, match="COBRA_CUDA=OFF"):
            CudaDecoder(small_weights())

    def test_no_room(self, gpu):
        gpu.plug_in("Small;8.9;8000000000;1000000;16;0;13000")
        with pytest.raises(MachineError, match=r"Small has no room; .* needs about 0\.\d\d GB, 0\.00 of 8\.00 GB are free"):
            CudaDecoder(small_weights())
        assert gpu.in_use == 0

    def test_no_room_for_the_kernels(self, gpu):
        gpu.refuse_modules(OUT_OF_MEMORY)
        with pytest.raises(MachineError, match=r"RTX 4090 has no room; .* needs about 0\.0[1-9] GB"):
            CudaDecoder(small_weights(MambaConfig(256, 1, 512, 512, 16, 4, 16)))

    def test_a_jetson_counts_what_the_page_cache_gives_back(self, gpu, monkeypatch, tmp_path):
        gpu.plug_in(ORIN_NANO.replace("6000000000", "1000000"))
        there = tmp_path / "meminfo"
        there.write_text("MemTotal: 7802734 kB\nMemAvailable: 900 kB\n")
        monkeypatch.setattr(available_memory, "_MEMINFO", there)
        with pytest.raises(MachineError, match="Orin has no room"):
            CudaDecoder(small_weights())
        there.write_text("MemTotal: 7802734 kB\nMemAvailable: 5859375 kB\n")
        assert first_gpu().memory() == (6_000_000_000, 7_990_000_000)
        there.unlink()
        assert first_gpu().memory() == (1_000_000, 7_990_000_000)

    def test_kernels_that_fit_no_driver(self, gpu, monkeypatch, tmp_path):
        gpu.refuse_modules(BAD_IMAGE)
        with pytest.raises(MachineError, match=r"takes none of the CUDA kernels .* CUDA 12 \(driver 525, JetPack 6\) or later"):
            CudaDecoder(small_weights())
        alone = write_kernels(tmp_path / "ptx.xz", ("compute_80",))
        monkeypatch.setattr(library, "kernels_file", lambda: alone)
        gpu.plug_in(RTX_4090.replace("8.9", "12.0"))
        gpu.refuse_modules(BAD_PTX)
        with pytest.raises(MachineError, match=r"it has to know CUDA 12\.5 \(driver 555\) or later; update the driver"):
            CudaDecoder(small_weights())

    def test_a_damaged_cubin(self, gpu, tmp_path, monkeypatch):
        file = write_kernels(tmp_path / "k.xz")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        monkeypatch.setattr(library, "kernels_file", lambda: file)
        with pytest.raises(MachineError, match="damaged"):
            CudaDecoder(small_weights())


def test_nothing_of_torch_is_imported():
    code = "import sys, cobra_edge.decode.cuda.decoder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_state_that_is_refused_leaves_the_gpu_alone(gpu):
    decoder = CudaDecoder(small_weights())
    before = gpu.calls
    with pytest.raises(InputError, match="belongs to another model"):
        decoder.step(1, CudaDecoder(small_weights(MambaConfig(64, 1, 64, 64, 4, 4, 8))).new_state())
    with pytest.raises(InputError, match="outside the vocabulary"):
        decoder.step(64, decoder.new_state())
    assert gpu.calls > before  # of the other decoder, which could be opened beside it


@pytest.mark.parametrize(("code", "lost"), [(ILLEGAL_ADDRESS, True), (719, True), (OUT_OF_MEMORY, False), (BAD_IMAGE, False)])
def test_a_lost_context_is_told_from_what_may_be_tried_again(gpu, code, lost):
    """`serve` ends with the former, so that a service manager can start it again."""
    gpu.plug_in()
    assert isinstance(refusal("running a layer", driver().CUresult(code)), DeviceLostError) is lost
