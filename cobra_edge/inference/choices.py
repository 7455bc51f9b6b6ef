"""Closed questions: the probability of each of some given answers.

An answer's probability is that of its tokens and of the end after them, so "Yes" is not counted into "Yes, it is". Answers that
begin alike are read once: the tokens form a tree, and the decoder's state, whose size is fixed, is copied where they part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from ..decode.decoder import Decoder, DecoderState
from ..decode.sampling import NOT_FINITE
from ..errors import InputError
from ..inputs.text import TextCodec, given_answer

Normalization = Literal["none", "length"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "length")
MOST_CHOICES = 256
_Tree = dict[int, "_Tree"]  # by next token


class Choice(msgspec.Struct, frozen=True):
    """One answer.

    Attributes:
        text: as given.
        probability: among the choices; they sum to 1.
        log_probability: natural logarithm of the probability of its tokens and the end, among all answers of the model.
        tokens: their number, the end included.
    """

    text: str
    probability: float
    log_probability: float
    tokens: int


class Choices(msgspec.Struct, frozen=True):
    """The answer to a closed question.

    Attributes:
        choices: in the given order.
        normalization: "none", or "length" for the mean over tokens.
    """

    choices: tuple[Choice, ...]
    normalization: Normalization

    @property
    def best(self) -> Choice:
        """The most probable choice; of equal ones the first."""
        return max(self.choices, key=lambda choice: choice.probability)

    def sure(self, least: float) -> Choice | None:
        """Return the best choice, or None if its probability is below `least`, a number from 0 to 1."""
        return self.best if self.best.probability >= least else None


def tokenized_choices(texts: Sequence[str], codec: TextCodec) -> list[list[int]]:
    """Return the tokens of each answer, the end token last.

    Raises:
        InputError: fewer than two choices, more than 256, an empty one, or two of the same tokens.
    """
    if not 2 <= len(texts) <= MOST_CHOICES:
        raise InputError(f"got {len(texts)} choices, expected 2 to {MOST_CHOICES}")
    found: dict[tuple[int, ...], str] = {}
    for text in texts:
        if not text.strip():
            raise InputError(f"choice {len(found) + 1} of {len(texts)} is empty; give a text")
        tokens = tuple(codec.answer(given_answer(text)))
        if tokens in found:
            raise InputError(f"the choices {found[tokens]!r} and {text!r} are the same to the model; leave one out")
        found[tokens] = text
    return [list(tokens) for tokens in found]


def choose(
    decoder: Decoder,
    logits: np.ndarray,
    state: DecoderState,
    texts: Sequence[str],
    tokens: Sequence[list[int]],
    normalization: Normalization = "none",
) -> Choices:
    """Return the probability of each choice after a prompt.

    Args:
        decoder: of the model.
        logits: (vocab,) float32, after the prompt.
        state: after the prompt; changed.
        texts: the choices.
        tokens: of each, by `tokenized_choices`.
        normalization: "none" compares whole answers; "length" compares the mean logarithm per token, which favors longer ones.

    Raises:
        InputError: logits are not finite.
    """
    sums = answer_log_probabilities(decoder, logits, state, tokens)
    compared = [s / len(t) for s, t in zip(sums, tokens, strict=True)] if normalization == "length" else sums
    largest = max(compared)
    weights = [math.exp(value - largest) for value in compared]
    return Choices(
        tuple(
            Choice(text, weight / sum(weights), total, len(sequence))
            for text, weight, total, sequence in zip(texts, weights, sums, tokens, strict=True)
        ),
        normalization,
    )


def answer_log_probabilities(
    decoder: Decoder, logits: np.ndarray, state: DecoderState, tokens: Sequence[Sequence[int]]
) -> list[float]:
    """Return the natural logarithm of the probability of each answer, its end included; see `choose`.

    Raises:
        InputError: logits are not finite.
    """
    tree: _Tree = {}
    for sequence in tokens:
        node = tree
        for token in sequence:
            node = node.setdefault(token, {})
    found: dict[tuple[int, ...], float] = {}
    _read(decoder, _log_softmax(logits), state, tree, (), 0.0, found)
    return [found[tuple(sequence)] for sequence in tokens]


def _read(
    decoder: Decoder,
    log_probabilities: np.ndarray,
    state: DecoderState,
    tree: _Tree,
    path: tuple[int, ...],
    total: float,
    found: dict[tuple[int, ...], float],
) -> None:
    """Add the log probability of each path of a tree to `found`. The last branch takes the state, the others a copy."""
    branches = [(token, below) for token, below in tree.items() if below]
    for token, below in tree.items():
        if not below:
            found[(*path, token)] = total + float(log_probabilities[token])
    for index, (token, below) in enumerate(branches):
        own = state if index == len(branches) - 1 else state.copy()
        after = _log_softmax(decoder.step(token, own))
        _read(decoder, after, own, below, (*path, token), total + float(log_probabilities[token]), found)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(NOT_FINITE)
    values -= values.max()
    return values - np.log(np.exp(values).sum())
