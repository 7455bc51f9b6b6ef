"""Sample a token from logits: greedy, temperature, top-k and top-p. The reference for all backends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np

from ..errors import InputError
from .decoder import DecoderState


class Sampling(msgspec.Struct, frozen=True):
    """How the next token is chosen.

    Attributes:
        temperature: 0 selects the most likely token; higher is more random.
        top_k: only the k most likely tokens; 0 for all.
        top_p: only the most likely tokens up to this cumulative probability (Holtzman et al. 2020).
        seed: of the random numbers; the same seed gives the same answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for invalid values."""
        if not 0 <= self.temperature <= 100:
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) to 100")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}, expected 0 (all) or more")
        if not 0 <= self.seed < 1 << 64:
            raise InputError(f"seed is {self.seed}, expected 0 to 2^64 - 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}, expected more than 0 and at most 1")


GREEDY = Sampling()


NOT_FINITE = "the decoder produced logits that are not finite; check the bundle with cobra_edge.inspect"


@runtime_checkable
class GeneratesItself(Protocol):
    """A decoder that samples on its device, by the same rule."""

    def generate(
        self, logits: np.ndarray, state: DecoderState, end_id: int, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        """See `inference.generate.generate`; logits are (vocab,) float32."""
        ...


def choose(logits: np.ndarray, sampling: Sampling, uniform: float, allowed: np.ndarray | None = None) -> int:
    """Return a token id from logits (vocab,) float32.

    Args:
        logits: (vocab,) float32.
        sampling: the sampling parameters.
        uniform: a random number in [0, 1), which selects the token by the cumulative distribution. Unused if greedy.
        allowed: (vocab,) bool, tokens to choose from; None for all.

    Raises:
        InputError: the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise InputError(NOT_FINITE)
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    below = logits[order].astype(np.float64) - float(logits[order[0]])  # before the division: it may overflow, to -inf
    with np.errstate(over="ignore"):
        p = np.exp(below / sampling.temperature)
    p /= p.sum()
    kept = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
    p = p[:kept] / p[:kept].sum()
    cumulative = np.cumsum(p)
    return int(order[np.searchsorted(cumulative / cumulative[-1], uniform, side="right")])
