"""The native decoder's library: how it is loaded, what it refuses, and kernels that share their work among threads."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.backends import open_decoder
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions, DecoderState
from cobra_edge.decode.native import kernels, library
from cobra_edge.decode.native.decoder import CompiledDecoder
from cobra_edge.errors import MachineError

from ..tolerance import assert_close
from .test_native import arguments_of

KERNELS = library.kernel_names()


@pytest.fixture(scope="module")
def tiny(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.fixture
def loaded_anew():
    library.library.cache_clear()
    yield
    library.library.cache_clear()


def test_a_missing_library_is_told_and_numpy_decodes(loaded_anew, monkeypatch, tiny):
    monkeypatch.setattr(library, "library_file", lambda: None)
    assert open_decoder(tiny).name == "numpy"
    with pytest.raises(MachineError, match="this installation has no native library; install the package again"):
        open_decoder(tiny, "cpu", "native")


@pytest.mark.parametrize("left", [0, 3, 40, 64, 4096, -4096, -1])
def test_a_library_that_was_cut_is_told(loaded_anew, monkeypatch, tmp_path, left):
    half = tmp_path / "libcobra_cpu.so"
    half.write_bytes(library.library_file().read_bytes()[:left])
    monkeypatch.setattr(library, "library_file", lambda: half)
    assert str(half) in library.why_not() and "install the package again" in library.why_not()


@pytest.mark.parametrize("interface", [0, None])
def test_a_library_of_another_version_is_not_called(loaded_anew, monkeypatch, interface):
    functions = {"cobra_interface": lambda: interface} if interface is not None else {}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: type("Library", (), {k: staticmethod(f) for k, f in functions.items()}))
    assert "belongs to another version of this package" in library.why_not()


def test_integers_that_c_would_cut_are_refused(tiny):
    sizes, arrays = arguments_of(tiny)
    for threads in (0, 1025, 2**32 + 1):
        with pytest.raises(ValueError, match="threads must be 1 to 1024"):
            CompiledDecoder(sizes, arrays, "auto", threads, True)
    with pytest.raises(ValueError, match="d_model must be"):
        CompiledDecoder(sizes | {"d_model": 2**64 + sizes["d_model"]}, arrays, "auto", 1, True)


def test_states_take_turns(tiny):
    """Addresses are kept from one token to the next: another state, or one in the memory of the last, is told apart."""
    decoder, config = CpuDecoder(tiny, DecoderOptions(threads=1)), tiny.manifest.model.mamba
    expected = []
    for tokens in ((1, 2, 3), (4, 5, 6)):
        state = DecoderState.zeros(config)
        expected.append([decoder.prefill(decoder.embed([token]), state) for token in tokens])
    states = [DecoderState.zeros(config), DecoderState.zeros(config)]
    for i in range(3):
        for state, tokens, wanted in zip(states, ((1, 2, 3), (4, 5, 6)), expected, strict=True):
            assert np.array_equal(decoder.step(tokens[i], state), wanted[i])
    for _ in range(3):
        state = DecoderState.zeros(config)
        assert np.array_equal(decoder.step(1, state), expected[0][0])
        del state


DECODES_TO_THE_END = """
import sys, threading
from cobra_edge.bundle.reader import Bundle
from cobra_edge.decode.cpu import CpuDecoder
from cobra_edge.decode.decoder import DecoderOptions

decoder, begun = CpuDecoder(Bundle.open(sys.argv[1]), DecoderOptions(threads=2)), threading.Event()

def decode():
    state, embeddings = decoder.new_state(), decoder.embed([1] * 4000)
    begun.set()
    while True:
        decoder.forward(embeddings, state)

threading.Thread(target=decode, daemon=True).start()
begun.wait()
"""


def test_a_process_may_end_while_a_thread_decodes(tiny_bundle):
    done = subprocess.run([sys.executable, "-c", DECODES_TO_THE_END, tiny_bundle], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_step_checks_its_state_each_time(tiny):
    decoder, state = CompiledDecoder(*arguments_of(tiny), "auto", 1, True), DecoderState.zeros(tiny.manifest.model.mamba)
    decoder.step(1, state.conv, state.ssm)
    for conv, ssm in ((state.conv[:1].copy(), state.ssm), (state.conv, state.ssm.astype(np.float64)), (None, state.ssm)):
        with pytest.raises(ValueError, match="the state's"):
            decoder.step(1, conv, ssm)
    with pytest.raises(IndexError, match="token -1 is outside the vocabulary"):
        decoder.step(-1, state.conv, state.ssm)


def scan(rng, tokens, channels, d_state):
    wide, narrow = (tokens, channels), (tokens, d_state)
    shapes = (wide, wide, (channels, d_state), narrow, narrow, (channels,), wide, (channels,), (channels, d_state))
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    inputs[2] = -np.abs(inputs[2])
    return inputs, [rng.standard_normal(shape).astype(np.float32) for shape in (wide, (channels, d_state))]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("tokens", "channels", "d_state"), [(1, 16, 16), (32, 33, 16), (65, 48, 8), (100, 37, 5)])
def test_the_gradient_of_the_scan_by_every_instruction_set(name, tokens, channels, d_state):
    inputs, gradients = scan(np.random.default_rng(tokens), tokens, channels, d_state)
    plain = kernels.scan_gradient(*inputs, *gradients, "scalar")
    for ours, reference in zip(kernels.scan_gradient(*inputs, *gradients, name), plain, strict=True):
        assert_close(ours, reference, "gradient")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("channels", [1, 16, 144, 300])
def test_the_bits_do_not_depend_on_the_number_of_threads(name, channels):
    inputs, gradients = scan(np.random.default_rng(channels), 9, channels, 16)
    x, h, weight, bias = inputs[0], inputs[8], np.ones((4, channels), np.float32), inputs[5]
    found = []
    for threads in (1, 2, 3, 20):
        state, taps = h.copy(), np.ones((channels, 4), np.float32)
        out = kernels.selective_scan(*inputs[:8], state, name, threads)
        u = kernels.conv_silu(x, taps, weight, bias, name, threads)
        found.append([out, state, u, taps, *kernels.scan_gradient(*inputs, *gradients, name, threads)])
    for more in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], more, strict=True))


def test_kernels_refuse_what_does_not_fit():
    inputs, gradients = scan(np.random.default_rng(0), 3, 16, 16)
    for i in range(11):
        given = [*inputs, *gradients]
        given[i] = np.zeros((*given[i].shape[:-1], given[i].shape[-1] + 1), np.float32)
        with pytest.raises(ValueError, match="has another shape"):
            kernels.scan_gradient(*given, "auto")
        given[i] = given[i].astype(np.float64)
        with pytest.raises(ValueError, match="is not float32"):
            kernels.scan_gradient(*given, "auto")
    with pytest.raises(ValueError, match="threads must be 1 to 1024"):
        kernels.selective_scan(*inputs, "auto", 0)
    frozen = inputs[8]
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="h is read-only"):
        kernels.selective_scan(*inputs, "auto")
