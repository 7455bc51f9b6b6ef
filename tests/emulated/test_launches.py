"""Launches of a prompt's layers: laid out once and repeated over a table of addresses, or one after the other."""

import numpy as np
import pytest

from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.launch import Address, Launch, Queue, Slot
from cobra_edge.decode.cuda.layer_table import LayerTable
from cobra_edge.decode.cuda.memory import copy_out
from cobra_edge.decode.cuda.prefill import Prefill
from cobra_edge.decode.cuda.state import GpuState
from cobra_edge.decode.decoder import DecoderOptions
from cobra_edge.decode.numpy_reference import NumpyDecoder
from cobra_edge.errors import MachineError
from cobra_edge.formats.model_config import MambaConfig

from ..tolerance import assert_close
from .weights import random_weights

CONFIG = MambaConfig(384, 4, 512, 768, 16, 4, 32, tied=True)
# Layers 0 and 3 are stored alike.
OTHERS = {
    "backbone.layers.1.mixer.in_proj.weight": "w3a16-g64",
    "backbone.layers.1.mixer.out_proj.weight": "float16",
    "backbone.layers.2.mixer.x_proj.weight": "w8a16-channel",
    "backbone.layers.2.mixer.dt_proj.weight": "w8a16-channel",
}


@pytest.fixture(scope="module", autouse=True)
def plugged_in(gpu_of_a_module):
    return gpu_of_a_module


@pytest.fixture(scope="module", params=["none", "both"])
def weights(request):
    return random_weights(CONFIG, "w4a16-g128", request.param, OTHERS)


class OneByOne(Queue):
    """The plain form of `Queue.repeat`."""

    def repeat(self, kinds, kind_of, table):
        for row, kind in zip(table, kind_of, strict=True):
            for launch in kinds[kind]:
                self.enqueue(launch.in_row(row))


def test_layers_stored_alike_are_one_kind(weights):
    table = LayerTable(CudaDecoder(weights)._weights.layers, CONFIG)
    assert table.kind_of == (0, 1, 2, 0) and len(table.kinds) == 3


@pytest.mark.parametrize("lengths", [(1, 24), (70,)], ids=str)
def test_repeated_launches_are_the_same_as_one_by_one(weights, lengths):
    """Bit by bit, whatever was read before: of a state that is read on, and of another."""
    decoder, found = CudaDecoder(weights), []
    for kind in (Queue, OneByOne):
        queue = kind(decoder._queue.gpu, decoder._queue.stream)
        prefill, state = Prefill(decoder._weights, queue), GpuState.blank(CONFIG, queue)
        prefill.run_layers(prefill.room(3), 3, GpuState.blank(CONFIG, queue))
        for n in lengths:
            room = prefill.room(n)
            embeddings = np.random.default_rng(n).standard_normal((n, CONFIG.d_model)).astype(np.float32)
            decoder._enter(embeddings, 0, n, room.residual, room.entering)
            prefill.run_layers(room, n, state)
        behind = np.empty_like(embeddings)
        copy_out(behind, room.residual, queue.stream, "copying the residual stream")
        queue.wait("copying the residual stream")
        found.append((behind, state.conv, state.ssm, state.n_tokens))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert np.isfinite(found[0][0]).all() and len({row.tobytes() for row in found[0][2]}) == CONFIG.n_layer


def test_layers_of_several_schemes_are_the_numpy_decoder(weights):
    ours, truth = CudaDecoder(weights), NumpyDecoder(weights, DecoderOptions(activations="float32"))
    a, b = ours.new_state(), truth.new_state()
    embeddings = truth.embed(list(range(9)))
    assert_close(ours.forward(embeddings, a), truth.forward(embeddings, b), "decoder", "float16 products")
    assert_close(a.ssm, b.ssm, "decoder", "float16 products")
    assert_close(a.conv, b.conv, "decoder", "float16 products")


def test_a_launch_that_is_refused_is_named(plugged_in):
    decoder = CudaDecoder(random_weights(CONFIG, "w4a16-g128"))
    state, embeddings = decoder.new_state(), decoder.embed([1, 2, 3])
    expected = decoder.prefill(embeddings, decoder.new_state())
    plugged_in.fail(14, 2, "cuLaunchKernel")  # of the second layer
    with pytest.raises(MachineError, match="reading 3 tokens: .* has no room"):
        decoder.prefill(embeddings, state)
    plugged_in.fail(14, 1, "cuLaunchKernel")
    with pytest.raises(MachineError, match=r"launching \w+ failed on the GPU \(CUDA_ERROR_INVALID_VALUE\)"):
        decoder.prefill(embeddings, state)
    assert state.n_tokens == 0
    assert np.array_equal(decoder.prefill(embeddings, decoder.new_state()), expected)  # and it goes on


def test_a_row_has_its_own_addresses():
    launch = Launch("k", (1, 2, 3), 32, (Slot(8), 8, Address(8), None, 0.5, Slot(0)), 4)
    there = launch.in_row(np.array([1 << 40, 3 << 40], np.uint64))
    assert there == Launch("k", (1, 2, 3), 32, (3 << 40, 8, 8, None, 0.5, 1 << 40), 4)
    assert [type(a) for a in there.arguments] == [Address, int, Address, type(None), float, Address]
