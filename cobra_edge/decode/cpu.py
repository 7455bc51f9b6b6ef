"""The native CPU decoder: runtimes/cpu over the bundle's memory-mapped weights.

Nothing is repacked: codes and scales are used in place. Activations stay float32, or are quantized to 8-bit integers per group
of weights ("int8", faster). Residual stream, convolution, recurrence and state are float32 in both.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ..bundle.reader import Bundle
from ..environment.threads import default_threads, physical_cores
from ..errors import InputError
from ..formats.hadamard import hadamard_factors, hadamard_matrix
from ..formats.packing import QuantizedTensor
from .arguments import checked_embeddings, checked_tokens
from .decoder import DecoderOptions, DecoderState, Weights
from .native.decoder import CompiledDecoder

log = logging.getLogger(__name__)


def arrays_of(tensors: Mapping[str, np.ndarray | QuantizedTensor]) -> dict[str, np.ndarray]:
    """Return what the compiled decoder takes: values, codes (out, n) uint8, scales float16; narrow 8-bit rows as float32."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if isinstance(value, QuantizedTensor) and not value.scheme.in_blocks(value.shape[1]):
            arrays[name] = value.dequantize()
        elif isinstance(value, QuantizedTensor):
            arrays |= {f"{name}.codes": value.codes, f"{name}.scales": value.scales}
            if value.clips is not None:
                arrays[f"{name}.clips"] = value.clips
        else:
            arrays[name] = value
    return arrays


class CpuDecoder:
    """The native decoder."""

    name, runs_on = "native", "cpu"
    same_bits_however_cut = True  # one thread sums every output, in a fixed order

    def __init__(self, source: Bundle | Weights, options: DecoderOptions, kernels: str = "auto") -> None:
        """Memory-map the weights and start the threads.

        Args:
            source: an open bundle, or weights in memory.
            options: threads and activations.
            kernels: name of an instruction set, or "auto" for the best that this CPU supports.

        Raises:
            BundleError: a tensor does not match.
            InputError: kernels that this CPU does not support.
            MemoryError: too little memory.
        """
        weights = Weights.of(source)
        self.config = weights.config
        cores, threads = physical_cores(), options.threads or default_threads()
        if threads > cores:
            log.warning("%d threads on %d cores will wait for each other; use %d", threads, cores, cores)
        arrays = arrays_of(weights.tensors)
        # Widths without a Hadamard matrix were refused when the tensors were read.
        recipe = weights.recipe
        if recipe.rotates_out_proj:
            arrays["rotation"] = hadamard_matrix(hadamard_factors(self.config.d_inner)[0])
        if recipe.rotates_residual:
            arrays["residual_rotation"] = hadamard_matrix(hadamard_factors(self.config.d_model)[0])
        self.activations = options.activations_of(recipe)
        sizes: dict[str, Any] = msgspec.structs.asdict(self.config)
        try:
            self._native = CompiledDecoder(sizes, arrays, kernels, threads, self.activations == "int8")
        except ValueError as error:
            raise InputError(f"{weights.origin}: {error}") from error
        self.kernels = self._native.kernels
        log.info("decoder kernels: %s, %d threads, %s activations", self.kernels, threads, self.activations)

    def new_state(self, like: DecoderState | None = None) -> DecoderState:
        """See `Decoder.new_state`."""
        if like is None:
            return DecoderState.zeros(self.config)
        like.require(self.config)
        return like.host()

    def embed(self, tokens: list[int]) -> np.ndarray:
        """See `Decoder.embed`."""
        return self._native.embed(checked_tokens(tokens, self.config))

    def _run(self, embeddings: np.ndarray, state: DecoderState, *, every_position: bool) -> np.ndarray:
        rows = checked_embeddings(embeddings, self.config)
        state.require_writable(self.config)
        with state.in_host_memory() as here:
            logits = self._native.forward(rows, here.conv, here.ssm, every_position)
            here.n_tokens += len(rows)
        return logits

    def prefill(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.prefill`."""
        return self._run(embeddings, state, every_position=False)

    def step(self, token: int, state: DecoderState) -> np.ndarray:
        """See `Decoder.step`."""
        (one,) = checked_tokens([token], self.config)
        state.require_writable(self.config)
        with state.in_host_memory() as here:
            logits = self._native.step(int(one), here.conv, here.ssm)
            here.n_tokens += 1
        return logits

    def forward(self, embeddings: np.ndarray, state: DecoderState) -> np.ndarray:
        """See `Decoder.forward`."""
        return self._run(embeddings, state, every_position=True)
