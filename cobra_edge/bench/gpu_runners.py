"""Runners on a GPU: our decoders, timed through the same generation that answers a user."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

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
    """Raise MachineError if the block runs out of GPU memory; `what` names what was being allocated."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"out of GPU memory for {what} next to the other runners; use {_LESS}") from error


def with_memory(gpu: Gpu, what: str, opened: Callable[[], GpuRunner], prompt: int) -> tuple[GpuRunner, int | None]:
    """Open a runner, prefill a prompt and decode one token at each context.

    Args:
        gpu: its memory.
        what: name of the runner, for messages.
        opened: opens the runner.
        prompt: length of the prompt.

    Returns:
        The runner and the peak GPU memory it allocated, in bytes; None if that is not counted.

    Raises:
        MachineError: out of GPU memory.
    """
    before = gpu.allocated_bytes()
    gpu.forget_peak()
    with enough_memory(what):
        runner = opened()
        if runner.reads_prompts:
            runner.prefill(prompt)
        for context in runner.contexts:
            runner.steps(1, context)
    after = gpu.peak_bytes()
    return runner, None if before is None or after is None else after - before
