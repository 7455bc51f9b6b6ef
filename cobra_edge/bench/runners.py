"""Runners: what is timed. Each prefills a prompt and decodes token by token from a context."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from rich.progress import Progress

from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import Decoder, DecoderState
from .decode_result import RunnerFacts

_CHUNK = 1024  # tokens read at once on the way to a long context


class Runner(Protocol):
    """One column of the result. Times are seconds of the work alone: its inputs are prepared before the clock starts."""

    name: str
    contexts: tuple[int, ...]  # context lengths at which decoding is timed
    weights_bytes: int  # read per token

    def facts(self) -> RunnerFacts:
        """Return how it is configured."""
        ...

    def prefill(self, tokens: int) -> float:
        """Prefill this many random tokens from an empty state, up to the logits of the last; returns seconds."""
        ...

    def steps(self, count: int, context: int) -> float:
        """Decode this many tokens from a context of that length; returns seconds."""
        ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """The state after a context, and the logits of the next token, (vocab,) float32."""

    state: DecoderState
    logits: np.ndarray


class Native:
    """The native decoder with one data type of activations."""

    def __init__(
        self, bundle: Bundle, decoder: CpuDecoder, activations: str, threads: int, predictions: Mapping[int, Prediction]
    ) -> None:
        """Prepare the runner.

        Args:
            bundle: the bundle of the decoder.
            decoder: opened with these activations and threads.
            activations: "float32" or "int8".
            threads: their number.
            predictions: by context length; their states are copied before use.
        """
        self.name = f"cobra_edge {activations}"
        self.contexts = tuple(predictions)
        self.weights_bytes = bundle.manifest.files[DECODER].bytes
        self._facts = RunnerFacts(kernels=decoder.kernels, activations=activations, threads=threads)
        self._decoder, self._predictions = decoder, predictions
        self._random = np.random.default_rng(1)

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        return self._facts

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self._decoder.config.vocab, count).tolist()

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`."""
        decoder, prompt, state = self._decoder, self._tokens(tokens), self._decoder.new_state()
        began = time.perf_counter()
        decoder.prefill(decoder.embed(prompt), state)
        return time.perf_counter() - began

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`."""
        decoder, tokens, state = self._decoder, self._tokens(count), self._predictions[context].state.copy()
        began = time.perf_counter()
        for token in tokens:
            decoder.step(token, state)
        return time.perf_counter() - began


def predictions_of(decoder: Decoder, contexts: tuple[int, ...], bar: Progress) -> dict[int, Prediction]:
    """Return state and logits after contexts of these lengths, in this order; a longer context continues a shorter one."""
    random, state = np.random.default_rng(2), decoder.new_state()
    task, predictions = bar.add_task(f"context of {max(contexts)}", total=max(contexts)), {}
    for context in sorted(set(contexts)):
        while state.n_tokens < context:
            count = min(_CHUNK, context - state.n_tokens)
            logits = decoder.prefill(decoder.embed(random.integers(0, decoder.config.vocab, count).tolist()), state)
            bar.advance(task, count)
        predictions[context] = Prediction(state.copy(), logits.copy())
    return {context: predictions[context] for context in contexts}
