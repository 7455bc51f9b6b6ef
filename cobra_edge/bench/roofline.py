"""The roofline: what a machine can do at best, and what decoding a token and prefilling a prompt cost at least."""

from __future__ import annotations

import time

import numpy as np

from ..bundle.memory_plan import state_bytes
from ..errors import MachineError
from ..formats.model_config import CobraConfig, MambaConfig
from ..formats.recipe import Recipe, stored_tensors

_BANDWIDTH_BYTES = 1 << 30  # far larger than any cache
_EMBEDDING = "backbone.embedding.weight"
# Of the CUDA decoder: in_proj with its norm; convolution with x_proj; recurrence with dt_proj and gate; out_proj with the sum.
LAUNCHES_A_LAYER = 4
_LOOK_UP, _HEAD, _CHOICE = 1, 1, 1  # the likeliest token; one drawn from a distribution takes two more


class Memory:
    """A gigabyte of memory, or less, to measure the bandwidth of reading it."""

    def __init__(self, threads: int, most_bytes: int | None = None) -> None:
        """Allocate the memory and write to every page."""
        size_bytes = min(_BANDWIDTH_BYTES, most_bytes or _BANDWIDTH_BYTES)
        self._words, self._threads = np.ones(size_bytes // 8, np.uint64), threads

    def read_bandwidth(self) -> float:
        """Read all of it once; returns bytes per second. Raises MachineError if the values read are not those written."""
        from ..decode.native.kernels import read_once

        began = time.perf_counter()
        total = read_once(self._words, self._threads)
        seconds = time.perf_counter() - began
        if total != len(self._words):
            raise MachineError("values read from memory differ from those written; test the memory of this machine")
        return self._words.nbytes / seconds


def peak_products(kernels: str, threads: int) -> float:
    """Return the int8 multiply-accumulates per second of an instruction set, with operands in registers."""
    from ..decode.native.kernels import peak_macs

    return peak_macs(kernels, threads)


def prefill_products(mamba: MambaConfig, tokens: int) -> int:
    """Return the multiply-accumulates of a prefill's matmuls: all layers for each token, the head for the last."""
    m = mamba
    layer = 2 * m.d_inner * m.d_model + (m.dt_rank + 2 * m.d_state) * m.d_inner + m.d_inner * m.dt_rank + m.d_model * m.d_inner
    return tokens * m.n_layer * layer + m.vocab * m.d_model


def weights_read_bytes(config: MambaConfig, recipe: Recipe) -> int:
    """Return the bytes of weights read per token: all of them once, and one row of an untied embedding.

    A tied embedding is read once, as the head.
    """
    sizes = {name: sum(t.n_bytes for t in entries) for name, entries in stored_tensors(config, recipe).items()}
    if not config.tied:
        sizes[_EMBEDDING] //= config.vocab
    return sum(sizes.values())


def token_bytes(config: CobraConfig, recipe: Recipe) -> int:
    """Return the bytes moved per token: the weights, and the state, which is read and written."""
    return weights_read_bytes(config.mamba, recipe) + 2 * state_bytes(config)


def launches_per_token(config: MambaConfig, recipe: Recipe) -> int:
    """Return how many kernels the CUDA decoder launches per token inside its graphs, the greedy choice included."""
    a_layer = LAUNCHES_A_LAYER + recipe.rotates_out_proj
    return config.n_layer * a_layer + _LOOK_UP + _HEAD + 2 * recipe.rotates_residual + _CHOICE
