"""Predictions of a build for the lines of a suite, with the runtime that ships: teacher-forced, and generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..decode.decoder import DecoderState
from ..decode.sampling import GREEDY
from ..errors import DriftError, InputError
from ..inference.choices import answer_log_probabilities
from ..inference.generate import generate
from ..inference.session import Session
from ..suite.tokenized import TokenizedLine, TokenizedSuite, reply_limit, with_image_state
from .metrics import log_softmax
from .state_sketch import state_sketch
from .top_tokens import TopTokens

# In memory at once, 1 GB as float64: 2,600 positions of a published model with 50,280 tokens.
_MAX_LOGITS = 1 << 27


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of a model for a line.

    Attributes:
        log_probs: next-token log-probabilities after each token of question and answer but the last, (n_text - 1, vocab)
            float64, or TopTokens.
        state: (n_layer, SKETCH_SIZE) float32, sketch of the recurrent state after those tokens.
        reply: tokens of the greedy reply, or of the most probable of a line's choices; without the end token.
        embeddings: (n_visual_tokens, d_model) float32, visual embeddings of the image, or None.
    """

    log_probs: np.ndarray | TopTokens
    state: np.ndarray
    reply: tuple[int, ...]
    embeddings: np.ndarray | None


def predictions(session: Session, suite: TokenizedSuite, first: int = 0) -> Iterator[Prediction]:
    """Yield the prediction of each line from index `first` on; consecutive lines about one image encode it once.

    Raises:
        InputError: an image that cannot be read.
    """

    def look(image: int | None) -> tuple[np.ndarray | None, DecoderState]:
        state, embeddings = session.decoder.new_state(), None
        if image is not None:
            embeddings = session.visual_embeddings(suite.load(image))
            session.decoder.prefill(embeddings, state)
        return embeddings, state

    for line, (embeddings, state) in with_image_state(suite.lines[first:], look):
        yield read_line(session, line, embeddings, state)


def read_line(session: Session, tokenized: TokenizedLine, embeddings: np.ndarray | None, looked: DecoderState) -> Prediction:
    """Return the prediction of one line.

    Args:
        session: that runs the build.
        tokenized: the line.
        embeddings: (n_visual_tokens, d_model) float32, of the image, or None.
        looked: state after the image; not modified.

    Raises:
        InputError: a line so long that its logits do not fit into memory. DriftError: logits that are not finite.
    """
    positions, vocab = len(tokenized.tokens) - 1, session.config.mamba.vocab
    if positions * vocab > _MAX_LOGITS:
        raise InputError(
            f"line {tokenized.number}: {positions} tokens with logits over a vocabulary of {vocab}; the limit is "
            f"{_MAX_LOGITS // vocab} tokens, shorten the line"
        )
    decoder, state = session.decoder, looked.copy()
    after_prompt = decoder.forward(decoder.embed(list(tokenized.prompt)), state)
    free = state.copy()
    after_answer = decoder.forward(decoder.embed(tokenized.answer[:-1]), state)
    try:
        reply = _reply(session, tokenized, after_prompt[-1], free)
    except InputError as error:  # logits that are not finite
        raise DriftError(f"line {tokenized.number}: {error}") from error
    return Prediction(log_softmax(np.concatenate([after_prompt, after_answer])), state_sketch(state.ssm), reply, embeddings)


def _reply(session: Session, line: TokenizedLine, logits: np.ndarray, state: DecoderState) -> tuple[int, ...]:
    """Return `Prediction.reply`; the state is changed. Raises InputError for logits that are not finite."""
    if line.choices:
        return most_probable(line.choices, answer_log_probabilities(session.decoder, logits, state, line.choices))
    return tuple(generate(session.decoder, logits, state, session.codec.end_id, reply_limit(line), GREEDY))


def most_probable(choices: Sequence[tuple[int, ...]], log_probabilities: Sequence[float]) -> tuple[int, ...]:
    """Return the choice with the largest log probability, of equal ones the first, without its end token."""
    return choices[max(range(len(choices)), key=log_probabilities.__getitem__)][:-1]
