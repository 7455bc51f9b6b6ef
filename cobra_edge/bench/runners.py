"""What is timed: something that reads a prompt, and goes on from a context token by token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.progress import Progress

from ..bundle.reader import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import Decoder, DecoderState

_CHUNK = 1024  # tokens read at once on the way to a long context


class Runner(Protocol):
    """One column of the result. Times are seconds of the work alone: what it needs is made before the clock starts."""

    name: str
    contexts: tuple[int, ...]  # context lengths it is stepped at
    weights_bytes: int  # what a token has to read of them

    def facts(self) -> dict[str, Any]:
        """Return what it is: kernels, versions, activations."""
        ...

    def prefill(self, tokens: int) -> float:
        """Read so many random tokens from an empty state, to the logits after the last; returns seconds."""
        ...

    def steps(self, count: int, context: int) -> float:
        """Read so many tokens one by one, logits after each, from a context of that length; returns seconds."""
        ...


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is left of reading a context: the state after it, and the logits (vocab,) of the token that follows."""

    state: DecoderState
    logits: np.ndarray


class Native:
    """The native decoder with one form of activations."""

    def __init__(
        self, bundle: Bundle, decoder: CpuDecoder, activations: str, threads: int, predictions: Mapping[int, Prediction]
    ) -> None:
        """Take what is to be timed.

        Args:
            bundle: the decoder's.
            decoder: opened with these activations and threads.
            activations: their form.
            threads: how many.
            readings: by context length; their states are copied before they are used.
        """
        self.name = f"cobra_edge {activations}"
        self.contexts = tuple(predictions)
        self.weights_bytes = bundle.manifest.files[DECODER].bytes
        self._facts = {"kernels": decoder.kernels, "activations": activations, "threads": threads}
        self._decoder, self._predictions = decoder, predictions
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """See `Runner.facts`."""
        return dict(self._facts)

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
    """Return what is left of reading each number of random tokens, one going on from the other; in the order given."""
    random, state = np.random.default_rng(2), decoder.new_state()
    task, predictions = bar.add_task(f"context of {max(contexts)}", total=max(contexts)), {}
    for context in sorted(set(contexts)):
        while state.n_tokens < context:
            count = min(_CHUNK, context - state.n_tokens)
            logits = decoder.prefill(decoder.embed(random.integers(0, decoder.config.vocab, count).tolist()), state)
            bar.advance(task, count)
        predictions[context] = Prediction(state.copy(), logits.copy())
    return {context: predictions[context] for context in contexts}
