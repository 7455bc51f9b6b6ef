"""One question's way through the session, in slices: between two of them others have their turn, or it ends.

What was remembered of the question's beginning is not read again. Whatever that is, the decoder is given the rest in the same
pieces, so the answer has the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..decode.decoder import DecoderState
from ..decode.sampling import Sampling
from ..errors import MachineError
from ..inference.session import Answer, Pixels, Session
from .conversation import Segment, longer_key, prefix_keys
from .errors import Refusal
from .prefix_cache import PrefixCache
from .stop_strings import StopStrings

PIECE = 256  # tokens of a segment that are read in one slice

Remembered = Literal["nothing", "image", "conversation"]
REMEMBERED: tuple[Remembered, ...] = ("nothing", "image", "conversation")


class ImageEvicted(Refusal):
    """The state of an image that was to be remembered is gone: the question has to come again, with the image's pixels."""

    def __init__(self) -> None:
        super().__init__(500, "what was remembered of the image is gone; ask again", "server_error")


@dataclass(frozen=True, eq=False)
class Question:
    """What is to be answered.

    Attributes:
        image_digest: SHA-256 of its image's file, or None.
        pixels: what `ImageTransform.pixels` made of the image; None where it is expected to be remembered.
        segments: at least one; none is empty.
        max_new_tokens: the answer's limit.
        sampling: how tokens are chosen.
        stops: texts that end the answer.
        arrived: `time.perf_counter()` when it was asked.
    """

    image_digest: bytes | None
    pixels: np.ndarray | None
    segments: tuple[Segment, ...]
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    arrived: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Finished:
    """The end of an answer. Times in milliseconds, from the question's arrival.

    Attributes:
        reason: "stop" at the model's end token or a stop string, "length" at the limit.
        image_tokens, prompt_tokens: read or remembered; the image's are the prompt's too.
        cached_tokens, completion_tokens: remembered; written.
        remembered: what did not have to be read again.
        queue_ms, ttft_ms, tpot_ms: until it was begun, to the first token (None for none), for each further one (None for < 2).
    """

    reason: Literal["stop", "length"]
    image_tokens: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    remembered: Remembered
    queue_ms: float
    ttft_ms: float | None
    tpot_ms: float | None


# What a slice of work comes to: nothing yet, a piece of text, the end.
Slice = str | Finished | None


def answer_in_slices(session: Session, cache: PrefixCache, question: Question) -> Generator[Slice, None, None]:
    """Answer a question, a slice at a time; `Finished` is the last. Closing the generator stops the decoding.

    Raises:
        ImageEvicted: the image is not remembered, and its pixels are not given.
        InputError, MachineError: the decoder fails.
    """
    queue_ms = (time.perf_counter() - question.arrived) * 1e3
    decoder, segments = session.decoder, question.segments
    keys = list(prefix_keys(question.image_digest, segments))
    # The last segment is always read: a state alone has no logits.
    found = cache.longest(keys[:-1])
    image_tokens = 0 if question.image_digest is None else session.config.n_visual_tokens
    if found is None:
        begun, remembered = 0, REMEMBERED[0]
        state = _look(session, question)
        if question.image_digest is not None:
            cache.keep(keys[0], state, on_disk=True)
    else:
        begun, kept = found
        state, remembered = decoder.new_state(like=kept), REMEMBERED[1 if begun == 0 else 2]
    cached_tokens = 0 if found is None else state.n_tokens
    yield None
    logits = np.empty(0, np.float32)
    for segment in segments[begun:]:
        for start in range(0, len(segment), PIECE):
            logits = session.read(list(segment[start : start + PIECE]), state)
            yield None
    # A generated answer is read token by token. Where that leaves other bits than reading it at once, it is read again.
    keeps_answer = decoder.same_bits_however_cut and not question.stops
    if not keeps_answer:
        cache.keep(keys[-1], state)
    prompt_tokens = state.n_tokens
    answer = session.speak(logits, state, question.max_new_tokens, question.sampling, began=question.arrived)
    stopped = yield from _shown(answer, StopStrings(question.stops))
    if keeps_answer:
        with suppress(MemoryError, MachineError):  # the answer is whole, and not lost because it cannot be remembered
            _keep_answer(session, cache, keys[-1], answer)
    yield Finished(
        "stop" if stopped or answer.finish == "end" else "length",
        image_tokens,
        prompt_tokens,
        cached_tokens,
        len(answer.tokens),
        remembered,
        queue_ms,
        answer.ttft_ms,
        answer.tpot_ms,
    )


def _look(session: Session, question: Question) -> DecoderState:
    if question.image_digest is None:
        return session.decoder.new_state()
    if question.pixels is None:
        raise ImageEvicted
    return session.look(Pixels(question.pixels))


def _shown(answer: Answer, stops: StopStrings) -> Generator[Slice, None, bool]:
    """Yield what of an answer is to be shown; returns whether a stop string ended it."""
    streamed = ""
    for piece in answer:
        streamed += piece
        yield stops.feed(piece) or None
        if stops.found:
            answer.stop()
            return True
    # What never became whole characters comes at the end, as replacement marks.
    yield (stops.feed(answer.text.removeprefix(streamed)) + stops.rest()) or None
    return stops.found


def _keep_answer(session: Session, cache: PrefixCache, prompt_key: bytes, answer: Answer) -> None:
    """Remember the conversation up to the end of an answer, so that the next turn costs its own tokens only."""
    assert answer.state is not None
    if answer.unread:
        session.read(answer.unread, answer.state)
    if answer.tokens:
        prompt_key = longer_key(prompt_key, answer.tokens)
    cache.keep(prompt_key, answer.state)
