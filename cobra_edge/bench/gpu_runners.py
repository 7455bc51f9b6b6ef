"""What is timed on a GPU: our decoders, through the generation that a user's answer comes from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from ..decode.decoder import Decoder
from ..decode.sampling import GREEDY
from ..errors import MachineError
from ..inference.generate import generate
from .gpu import Gpu
from .runners import Prediction, Runner

_NO_END = -1  # no token has this id: an answer goes on to its limit
_LESS = "fewer of --scheme and --peer, a shorter --context or a larger GPU"


class GpuRunner(Runner, Protocol):
    """A runner that says what a token moves, and whether prompts are timed."""

    reads_prompts: bool

    def traffic_bytes(self, context: int) -> int:
        """Return the bytes that a token after such a context has to read and write."""
        ...


class Ours:
    """A decoder of this package on a GPU."""

    reads_prompts = True

    def __init__(
        self, name: str, decoder: Decoder, gpu: Gpu, predictions: Mapping[int, Prediction], moved: tuple[int, int]
    ) -> None:
        """Take what is to be timed.

        Args:
            name: of the runner.
            decoder: opened on the GPU.
            gpu: its clock.
            readings: by context length; their states are copied before they are used.
            moved: bytes of weights that a token reads, and bytes of state that it reads and writes.
        """
        self.name, self.contexts = name, tuple(predictions)
        self.weights_bytes, self._state_bytes = moved
        self._decoder, self._gpu, self._predictions = decoder, gpu, predictions
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """See `Runner.facts`."""
        describe: Callable[[], str] | None = getattr(self._decoder, "describe", None)
        return {"backend": self._decoder.name} | ({} if describe is None else {"described": describe()})

    def traffic_bytes(self, context: int) -> int:
        """See `GpuRunner.traffic_bytes`; a state has one size."""
        return self.weights_bytes + self._state_bytes

    def prefill(self, tokens: int) -> float:
        """See `Runner.prefill`."""
        decoder = self._decoder
        prompt = self._random.integers(0, decoder.config.vocab, tokens).tolist()
        state = decoder.new_state()
        return self._gpu.seconds(lambda: decoder.prefill(decoder.embed(prompt), state))

    def steps(self, count: int, context: int) -> float:
        """See `Runner.steps`: tokens are chosen greedily, as an answer's are."""
        reading = self._predictions[context]
        state = reading.state.copy()

        def answer() -> None:
            # The last token of an answer is not read back: one more is generated than steps are taken.
            deque(generate(self._decoder, reading.logits, state, _NO_END, count + 1, GREEDY), maxlen=0)

        return self._gpu.seconds(answer)


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise MachineError where the GPU's memory runs out meanwhile; `what` was to be held beside the others."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"the GPU's memory does not hold {what} beside the others; take {_LESS}") from error


def with_memory(gpu: Gpu, what: str, opened: Callable[[], GpuRunner], prompt: int) -> tuple[GpuRunner, dict[str, Any]]:
    """Open a runner, let it read a prompt and step once at each context.

    Args:
        gpu: its memory.
        what: is opened, for messages.
        opened: opens it.
        prompt: tokens of the prompt.

    Returns:
        The runner and the most of the GPU's memory that it took meanwhile, `peak_bytes`; None where that is not counted.

    Raises:
        MachineError: the GPU's memory does not suffice.
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
    return runner, {"peak_bytes": None if before is None or after is None else after - before}
