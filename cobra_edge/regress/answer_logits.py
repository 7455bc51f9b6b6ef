"""Logits of a suite's answers, teacher-forced through a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ..decode.decoder import Decoder, DecoderState
from ..suite.tokenized import TokenizedLine, with_image_state


def look_at(decoder: Decoder, embeddings: Sequence[np.ndarray] | np.ndarray) -> Callable[[int | None], DecoderState]:
    """Return the function `look` of `answer_logits` for images given as visual embeddings.

    Args:
        decoder: that reads them.
        embeddings: of each image, (n_visual_tokens, d_model) float32.
    """

    def look(image: int | None) -> DecoderState:
        state = decoder.new_state()
        if image is not None:
            decoder.prefill(embeddings[image], state)
        return state

    return look


def answer_logits(
    decoder: Decoder, lines: Iterable[TokenizedLine], look: Callable[[int | None], DecoderState]
) -> Iterator[np.ndarray]:
    """Yield for each line the logits before each token of its answer, (n_answer, vocab) float32.

    Args:
        decoder: that runs.
        lines: those about one image should follow each other, so that it is read once.
        look: returns the state after reading an image, by its index; the empty state for None.
    """
    for line, looked in with_image_state(lines, look):
        yield decoder.forward(decoder.embed(line.inputs), looked.copy())[line.answer_from :]
