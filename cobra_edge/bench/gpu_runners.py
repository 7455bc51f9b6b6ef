"""What is timed on a card: our decoders, through the generation that a user's answer comes from."""

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
from .gpu import Card
from .runners import Contestant, Reading

_NO_END = -1  # no token has this id: an answer goes on to its limit
_LESS = "fewer of --scheme and --peer, a shorter --context or a larger card"


class CardContestant(Contestant, Protocol):
    """A contestant that says what a token moves, and whether prompts are timed."""

    reads_prompts: bool

    def traffic_bytes(self, context: int) -> int:
        """Return the bytes that a token after such a context has to read and write."""
        ...


class Ours:
    """A decoder of this package on a card."""

    reads_prompts = True

    def __init__(
        self, name: str, decoder: Decoder, card: Card, readings: Mapping[int, Reading], moved: tuple[int, int]
    ) -> None:
        """Take what is to be timed.

        Args:
            name: of the contestant.
            decoder: opened on the card.
            card: its clock.
            readings: by context length; their states are copied before they are used.
            moved: bytes of weights that a token reads, and bytes of state that it reads and writes.
        """
        self.name, self.contexts = name, tuple(readings)
        self.weights_bytes, self._state_bytes = moved
        self._decoder, self._card, self._readings = decoder, card, readings
        self._random = np.random.default_rng(1)

    def facts(self) -> dict[str, Any]:
        """See `Contestant.facts`."""
        describe: Callable[[], str] | None = getattr(self._decoder, "describe", None)
        return {"backend": self._decoder.name} | ({} if describe is None else {"described": describe()})

    def traffic_bytes(self, context: int) -> int:
        """See `CardContestant.traffic_bytes`; a state has one size."""
        return self.weights_bytes + self._state_bytes

    def prefill(self, tokens: int) -> float:
        """See `Contestant.prefill`."""
        decoder = self._decoder
        prompt = self._random.integers(0, decoder.config.vocab, tokens).tolist()
        state = decoder.new_state()
        return self._card.seconds(lambda: decoder.prefill(decoder.embed(prompt), state))

    def steps(self, count: int, context: int) -> float:
        """See `Contestant.steps`: tokens are chosen greedily, as an answer's are."""
        reading = self._readings[context]
        state = reading.state.copy()

        def answer() -> None:
            # The last token of an answer is not read back: one more is generated than steps are taken.
            deque(generate(self._decoder, reading.logits, state, _NO_END, count + 1, GREEDY), maxlen=0)

        return self._card.seconds(answer)


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise MachineError where the card's memory runs out meanwhile; `what` was to be held beside the others."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineError(f"the card's memory does not hold {what} beside the others; take {_LESS}") from error


def with_memory(
    card: Card, what: str, opened: Callable[[], CardContestant], prompt: int
) -> tuple[CardContestant, dict[str, Any]]:
    """Open a contestant, let it read a prompt and step once at each context.

    Args:
        card: its memory.
        what: is opened, for messages.
        opened: opens it.
        prompt: tokens of the prompt.

    Returns:
        The contestant and the most of the card's memory that it took meanwhile, `peak_bytes`; None where that is not counted.

    Raises:
        MachineError: the card's memory does not suffice.
    """
    before = card.allocated_bytes()
    card.forget_peak()
    with enough_memory(what):
        contestant = opened()
        if contestant.reads_prompts:
            contestant.prefill(prompt)
        for context in contestant.contexts:
            contestant.steps(1, context)
    after = card.peak_bytes()
    return contestant, {"peak_bytes": None if before is None or after is None else after - before}
