"""Token generation: the decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..decode.decoder import Decoder, DecoderState
from ..decode.sampling import GeneratesItself, Sampling, choose
from .forms import FormMask

OnToken = Callable[[np.ndarray, int], None]


def generate(
    decoder: Decoder,
    logits: np.ndarray,
    state: DecoderState,
    end_id: int,
    max_new_tokens: int,
    sampling: Sampling,
    mask: FormMask | None = None,
    on_token: OnToken | None = None,
) -> Iterator[int]:
    """Yield token ids from the logits (vocab,) float32 after a prompt until the end token (not yielded) or the limit.

    The state is updated in place, up to the last yielded token but one. A decoder with its own loop (`GeneratesItself`) uses
    it, unless the answer has a form or its logits are asked for.

    Args:
        decoder: of the model.
        logits: after the prompt.
        state: after the prompt.
        end_id: the end token.
        max_new_tokens: the limit.
        sampling: how a token is chosen.
        mask: of the answer's form; None for free text.
        on_token: called with the logits and the token chosen from them, before it is yielded.

    Raises:
        InputError: logits are not finite, or the form is too complex.
    """
    if isinstance(decoder, GeneratesItself) and mask is None and on_token is None:
        yield from decoder.generate(logits, state, end_id, max_new_tokens, sampling)
        return
    rng = np.random.default_rng(sampling.seed)
    for index in range(max_new_tokens):
        token = choose(logits, sampling, rng.random(), None if mask is None else mask.allowed())
        if token == end_id:
            return
        if on_token is not None:
            on_token(logits, token)
        yield token
        if mask is not None:
            mask.accept(token)
        if index + 1 < max_new_tokens:
            logits = decoder.step(token, state)
