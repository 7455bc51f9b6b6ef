"""What is timed: something that reads a prompt, and goes on from a context token by token."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from rich.progress import Progress

from ..bundle import DECODER, Bundle
from ..decode.cpu import CpuDecoder
from ..decode.decoder import DecoderState

_CHUNK = 1024  # tokens read at once on the way to a long context


class Contestant(Protocol):
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


class Native:
    """The native decoder with one form of activations."""

    def __init__(
        self, bundle: Bundle, decoder: CpuDecoder, activations: str, threads: int, states: dict[int, DecoderState]
    ) -> None:
        """Take what is to be timed.

        Args:
            bundle: the decoder's.
            decoder: opened with these activations and threads.
            activations: their form.
            threads: how many.
            states: by context length; copied before they are used.
        """
        self.name = f"cobra_edge {activations}"
        self.contexts = tuple(states)
        self.weights_bytes = bundle.manifest.files[DECODER].bytes
        self._facts = {"kernels": decoder.kernels, "activations": activations, "threads": threads}
        self._decoder, self._states = decoder, states
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """See `Contestant.facts`."""
        return dict(self._facts)

    def _tokens(self, count: int) -> list[int]:
        return self._random.integers(0, self._decoder.config.vocab, count).tolist()

    def prefill(self, tokens: int) -> float:
        """See `Contestant.prefill`."""
        decoder, prompt, state = self._decoder, self._tokens(tokens), self._decoder.new_state()
        began = time.perf_counter()
        decoder.prefill(decoder.embed(prompt), state)
        return time.perf_counter() - began

    def steps(self, count: int, context: int) -> float:
        """See `Contestant.steps`."""
        decoder, tokens, state = self._decoder, self._tokens(count), self._states[context].copy()
        began = time.perf_counter()
        for token in tokens:
            decoder.step(token, state)
        return time.perf_counter() - began


def states_after(decoder: CpuDecoder, contexts: tuple[int, ...], bar: Progress) -> dict[int, DecoderState]:
    """Return the state after each number of random tokens, one reading going on from the other; in the order given."""
    random, state = np.random.default_rng(2), decoder.new_state()
    task, states = bar.add_task(f"context of {max(contexts)}", total=max(contexts)), {}
    for context in sorted(set(contexts)):
        while state.n_tokens < context:
            count = min(_CHUNK, context - state.n_tokens)
            decoder.prefill(decoder.embed(random.integers(0, decoder.config.vocab, count).tolist()), state)
            bar.advance(task, count)
        states[context] = state.copy()
    return {context: states[context] for context in contexts}
