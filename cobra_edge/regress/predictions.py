"""What a build makes of a suite's lines, on the runtime that ships: teacher-forced, and in its own words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..decode.decoder import DecoderState
from ..decode.sampling import GREEDY
from ..errors import DriftError, InputError
from ..inference.generate import generate
from ..inference.session import Session
from ..suite.tokenized import TokenizedLine, TokenizedSuite, reply_limit
from .metrics import log_softmax
from .state_sketch import state_sketch
from .top_tokens import TopTokens

# That are in memory together, 1 GB as float64: 2,600 tokens of a published model's 50,280 words.
_MOST_LOGITS = 1 << 27


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model made of a line.

    Attributes:
        log_probs: of the next token after each token of question and answer but the last: (n_text - 1, vocab) float64, or the
            likely part of them.
        state: (n_layer, SKETCH) float32, of the recurrent state after those tokens.
        reply: tokens of its own greedy answer, without the end token.
        embeddings: (n_visual_tokens, d_model) float32, the image as the decoder saw it, or None.
    """

    log_probs: np.ndarray | TopTokens
    state: np.ndarray
    reply: tuple[int, ...]
    embeddings: np.ndarray | None


def predictions(session: Session, suite: TokenizedSuite, first: int = 0) -> Iterator[Prediction]:
    """Yield the reading of each line from index `first` on; an image that follows itself is looked at once.

    Raises:
        InputError: an image that cannot be read.
    """
    looked: tuple[int | None, np.ndarray | None, DecoderState] = None, None, session.decoder.new_state()
    for tokenized in suite.lines[first:]:
        if tokenized.image != looked[0]:
            state, embeddings = session.decoder.new_state(), None
            if tokenized.image is not None:
                embeddings = session.visual_embeddings(suite.load(tokenized.image))
                session.decoder.prefill(embeddings, state)
            looked = tokenized.image, embeddings, state
        yield read_line(session, tokenized, looked[1], looked[2])


def read_line(session: Session, tokenized: TokenizedLine, embeddings: np.ndarray | None, looked: DecoderState) -> Prediction:
    """Read one line from the state after its image, which is left as it is.

    Raises:
        InputError: a line so long that its logits would fill the memory. DriftError: the free answer's are not finite.
    """
    positions, vocab = len(tokenized.tokens) - 1, session.config.mamba.vocab
    if positions * vocab > _MOST_LOGITS:
        raise InputError(
            f"line {tokenized.number}: {positions} tokens, each with logits over {vocab} words; at most "
            f"{_MOST_LOGITS // vocab} are compared, shorten it"
        )
    decoder, state = session.decoder, looked.copy()
    after_prompt = decoder.forward(decoder.embed(list(tokenized.prompt)), state)
    free = state.copy()
    after_answer = decoder.forward(decoder.embed(tokenized.answer[:-1]), state)
    end, limit = session.codec.end_id, reply_limit(tokenized)
    try:
        reply = tuple(generate(decoder, after_prompt[-1], free, end, limit, GREEDY))
    except InputError as error:  # logits that are not finite
        raise DriftError(f"line {tokenized.number}: {error}") from error
    return Prediction(log_softmax(np.concatenate([after_prompt, after_answer])), state_sketch(state.ssm), reply, embeddings)
