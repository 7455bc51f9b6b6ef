"""Runners on a GPU: our decoders, timed through the same generation that answers a user."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from ..decode.decoder import Decoder
from ..decode.sampling import GREEDY
from ..errors import MachineError
from ..inference.generate import generate
from .decode_result import RunnerFacts
from .gpu import Gpu
from .runners import Prediction, Runner

_NO_END = -1  # no token has this id: every answer has the full length
_LESS = "fewer values of --scheme and --peer, a shorter --context or a larger GPU"


class GpuRunner(Runner, Protocol):
    """A runner on a GPU, with the memory traffic of a token and whether prefill is timed."""

    reads_prompts: bool

    def traffic_bytes(self, context: int) -> int:
        """Return the bytes read and written per token after a context of that length."""
        ...


class Ours:
    """One of our decoders on a GPU."""

    reads_prompts = True

    def __init__(
        self, name: str, decoder: Decoder, gpu: Gpu, predictions: Mapping[int, Prediction], moved: tuple[int, int]
    ) -> None:
        """Prepare the runner.

        Args:
            name: of the runner.
            decoder: opened on the GPU.
            gpu: measures the time.
            predictions: by context length; their states are copied before use.
            moved: bytes of weights read per token, and of state read and written.
        """
        self.name, self.contexts = name, tuple(predictions)
        self.weights_bytes, self._state_bytes = moved
        self._decoder, self._gpu, self._predictions = decoder, gpu, predictions
        self._random = np.random.default_rng(1)

    def facts(self) -> RunnerFacts:
        """See `Runner.facts`."""
        describe: Callable[[], str] | None = getattr(self._decoder, "describe", None)
        return RunnerFacts(backend=self._decoder.name, described=None if describe is None else describe())

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`; the size of the state is fixed."""
        return self.weights_bytes + self._state_bytes

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`."""
        decoder = self._decoder
        prompt = self._random.integers(0, decoder.config.vocab, tokens).tolist()
        state = decoder.new_state()
        return self._gpu.seconds(lambda: decoder.prefill(decoder.embed(prompt), state))

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`: decoding is greedy."""
        reading = self._predictions[context]
        state = reading.state.copy()

        def answer() -> None:
            # The last token of an answer is not fed back, so generating one more token takes `count` steps.
            deque(generate(self._decoder, reading.logits, state, _NO_END, count + 1, GREEDY), maxlen=0)

        return self._gpu.seconds(answer)


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise MachineError if torch runs out of GPU memory in the block; `what` names what was being allocated."""
    torch = sys.modules.get("torch")
    out_of_memory: tuple[type[Exception], ...] = () if torch is None else (torch.OutOfMemoryError,)
    try:
        yield
    except out_of_memory as error:
        raise MachineError(f"out of GPU memory for {what} next to the other runners; use {_LESS}") from error


def opened_peer(gpu: Gpu, what: str, opened: Callable[[], GpuRunner], prompt: int) -> tuple[GpuRunner, int]:
    """Open a peer, prefill a prompt and decode one token at each context.

    Args:
        gpu: its memory.
        what: name of the runner, for messages.
        opened: opens the runner.
        prompt: length of the prompt.

    Returns:
        The runner and the most GPU memory taken, in bytes: torch keeps what it has allocated once.

    Raises:
        MachineError: out of GPU memory.
    """
    before, least = gpu.free_bytes(), sys.maxsize
    with enough_memory(what):
        runner = opened()
        if runner.reads_prompts:
            runner.prefill(prompt)
        for context in runner.contexts:
            runner.steps(1, context)
            least = min(least, gpu.free_bytes(keep=True))
    return runner, before - least


def open_ours(gpu: Gpu, opened: Callable[[], Decoder], prompt: int) -> tuple[Decoder, int]:
    """Open one of our decoders, prefill a prompt and decode a token.

    Args:
        gpu: its memory.
        opened: opens the decoder.
        prompt: length of the prompt.

    Returns:
        The decoder and the GPU memory it takes, in bytes: weights, buffers and a state.

    Raises:
        MachineError: out of GPU memory.
    """
    before = gpu.free_bytes()
    decoder = opened()
    state = decoder.new_state()
    decoder.prefill(decoder.embed([i % decoder.config.vocab for i in range(prompt)]), state)
    decoder.step(0, state)
    return decoder, before - gpu.free_bytes(keep=True)
