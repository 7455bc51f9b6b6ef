"""What this machine could do at best: bytes a second that its memory gives, products a second that its registers take."""

from __future__ import annotations

import time

import numpy as np

from ..errors import MachineError
from ..formats.model_config import MambaConfig

_BANDWIDTH_BYTES = 1 << 30  # far beyond any cache


class Memory:
    """A gigabyte of ordinary memory to read."""

    def __init__(self, threads: int) -> None:
        """Take the memory and write to every page of it."""
        self._words, self._threads = np.ones(_BANDWIDTH_BYTES // 8, np.uint64), threads

    def read_bandwidth(self) -> float:
        """Read all of it once; returns bytes a second. Raises MachineError when other values come back."""
        from ..decode import _cpu

        began = time.perf_counter()
        total = _cpu.kernels.read_once(self._words, self._threads)
        seconds = time.perf_counter() - began
        if total != len(self._words):
            raise MachineError("the memory gave back other values than were written to it; test this machine's memory")
        return self._words.nbytes / seconds


def peak_products(kernels: str, threads: int) -> float:
    """Return int8 multiply-accumulates a second that an instruction set does in registers."""
    from ..decode import _cpu

    return float(_cpu.kernels.peak_macs(kernels, threads))


def prefill_products(mamba: MambaConfig, tokens: int) -> int:
    """Return the multiply-accumulates of the matrices over a prompt: every layer for each token, the head for the last."""
    m = mamba
    layer = 2 * m.d_inner * m.d_model + (m.dt_rank + 2 * m.d_state) * m.d_inner + m.d_inner * m.dt_rank + m.d_model * m.d_inner
    return tokens * m.n_layer * layer + m.vocab * m.d_model
