"""What the memory plan of a target says, beside what the decoder asks the driver for."""

import gc

import msgspec
import numpy as np
import pytest

from cobra_edge.decode.cuda.decoder import CudaDecoder
from cobra_edge.decode.cuda.device_memory import context_bytes
from cobra_edge.decode.cuda.prefill import CHUNK
from cobra_edge.decode.cuda.tiles import gemm_launch, most_part_floats, most_scan_chunks, scan_launch
from cobra_edge.export.memory_plan import plan_memory
from cobra_edge.formats.model_config import CobraConfig, MambaConfig
from cobra_edge.formats.scheme import SCHEMES
from cobra_edge.formats.targets import target_named

from .weights import random_weights

MAMBA = MambaConfig(384, 2, 512, 768, 16, 4, 24, tied=True)
UNTIED = MambaConfig(192, 3, 520, 320, 5, 3, 7, tied=False)  # rows of dt_proj are padded
MULTIPROCESSORS = 16  # of the fake GPU


def planned(config, recipe, max_length):
    model = CobraConfig("small", None, None, config, max_length=max_length)
    target = msgspec.structs.replace(target_named("rtx-4090"), multiprocessors=MULTIPROCESSORS)
    return plan_memory(model, recipe, target)


@pytest.mark.parametrize("config", [MAMBA, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("max_length", [300, CHUNK + 500])
@pytest.mark.parametrize(
    ("scheme", "rotation"),
    [
        *((name, "none") for name, scheme in SCHEMES.items() if scheme.code_format == "int" and not scheme.refuses(192)),
        ("w4a16-g32", "both"),
        ("fp16", "residual"),
    ],
)
def test_a_plan_is_what_a_decoder_allocates(gpu, config, max_length, scheme, rotation):
    """To the byte, with a session's state and after a prompt as long as the model reads, whatever was read before."""
    gpu.run_no_kernels()
    gc.collect()  # decoders of other tests give back their pinned memory, which no new GPU does for them
    pinned = gpu.pinned
    weights = random_weights(config, scheme, rotation)
    plan = planned(config, weights.recipe, max_length)
    decoder = CudaDecoder(weights)
    state = decoder.new_state()
    for n in (max_length, 17, 299):
        decoder.prefill(np.zeros((n, config.d_model), np.float32), state)
        decoder.forward(np.zeros((n, config.d_model), np.float32), state)
    assert gpu.in_use + gpu.pinned - pinned == plan.decoder_bytes + plan.state_bytes + plan.buffer_bytes
    del decoder, state
    gc.collect()


@pytest.mark.parametrize("multiprocessors", [1, 8, 34, 132, 188])
def test_no_product_and_no_scan_is_cut_into_more(multiprocessors):
    most = most_part_floats(multiprocessors)
    found = 0
    for tokens in (1, 16, 17, 63, 64, 129, 300, 1000, 2048):
        for n_out, n_in in ((5120, 2560), (192, 5120), (2560, 5120), (50280, 2560), (64, 8192)):
            for bits in (3, 4, 8, 16):
                launch = gemm_launch(bits, n_out, n_in, tokens, multiprocessors)
                found = max(found, launch.splits * n_out * tokens if launch.splits > 1 else 0)
        for shorter in range(1, tokens + 1, 7):
            assert scan_launch(256, 16, shorter, multiprocessors).chunks <= most_scan_chunks(256, 16, tokens, multiprocessors)
    assert most / 20 < found <= most


def test_a_context_is_what_was_measured_by_others():
    assert (context_bytes(34), context_bytes(8)) == (107 << 20, 107 << 20)
    assert (555 << 20) - 188 < context_bytes(188) <= 555 << 20
