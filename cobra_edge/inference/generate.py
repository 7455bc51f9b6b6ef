"""Token generation: the decoding loop."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..decode.decoder import Decoder, DecoderState
from ..decode.sampling import GeneratesItself, Sampling, choose


def generate(
    decoder: Decoder, logits: np.ndarray, state: DecoderState, end_id: int, max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """Yield token ids from the logits (vocab,) float32 after a prompt until the end token (not yielded) or the limit.

    The state is updated in place, up to the last yielded token but one. A decoder with its own loop (`GeneratesItself`) uses
    it.

    Raises:
        InputError: logits are not finite.
    """
    if isinstance(decoder, GeneratesItself):
        yield from decoder.generate(logits, state, end_id, max_new_tokens, sampling)
        return
    rng = np.random.default_rng(sampling.seed)
    for index in range(max_new_tokens):
        token = choose(logits, sampling, rng.random())
        if token == end_id:
            return
        yield token
        if index + 1 < max_new_tokens:
            logits = decoder.step(token, state)
