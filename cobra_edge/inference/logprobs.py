"""Log-probabilities of the tokens of an answer, and of the most probable ones beside them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import InputError

MOST_TOP = 20  # as OpenAI's API


class Logprob(NamedTuple):
    """A token and its natural log-probability, of the model: before temperature, top-k, top-p and form."""

    token: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """A token of an answer, and the most probable tokens at its place, in falling order."""

    chosen: Logprob
    top: tuple[Logprob, ...]


def require_top(top: int) -> None:
    """Raise InputError unless so many most probable tokens can be asked for."""
    if not 0 <= top <= MOST_TOP:
        raise InputError(f"top-logprobs is {top}, expected 0 to {MOST_TOP}")


def token_logprobs(logits: np.ndarray, token: int, top: int) -> TokenLogprobs:
    """Return the log-probability of a token and of the `top` most probable ones, from finite logits (vocab,) float32."""
    wide = logits.astype(np.float64)
    largest = wide.max()
    total = float(largest + np.log(np.exp(wide - largest).sum()))
    order = np.argpartition(-wide, top)[:top] if 0 < top < len(wide) else np.arange(min(top, len(wide)))
    order = order[np.argsort(-wide[order], kind="stable")]

    def of(index: int) -> Logprob:
        return Logprob(int(index), float(wide[index]) - total)

    return TokenLogprobs(of(token), tuple(map(of, order)))
