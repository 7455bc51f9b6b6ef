"""Generation of one answer, in time slices: between two of them the scheduler runs other requests.

A cached prefix is not read again. The rest of the prompt is always split into the same chunks, so the answer has the same bits
with and without the cache.
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
from ..inference.forms import FormMask
from ..inference.logprobs import TokenLogprobs
from ..inference.session import Answer, Pixels, Session
from .conversation import Segment, longer_key, prefix_keys
from .errors import ApiError
from .prefix_cache import PrefixCache
from .stop_strings import StopStrings

CHUNK = 256  # tokens of a segment that are prefilled in one slice

Remembered = Literal["nothing", "image", "conversation"]
REMEMBERED: tuple[Remembered, ...] = ("nothing", "image", "conversation")


class ImageEvicted(ApiError):
    """The cached state of an image was evicted: the request has to be repeated with the image's pixels."""

    def __init__(self) -> None:
        super().__init__(500, "the cached state of the image was evicted; retry", "server_error")


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """A request for one answer.

    Attributes:
        image_digest: SHA-256 of the image file, or None.
        pixels: what `ImageTransform.pixels` returned for the image, of its shape and dtype; None where a cached state is
            expected.
        segments: tokens of the prompt, at least one segment; none is empty.
        max_new_tokens: maximum length of the answer.
        sampling: sampling parameters.
        stops: stop strings.
        mask: of the answer's form; None for free text.
        top_logprobs: return log-probabilities, and of so many most probable tokens; None for none.
        arrived: `time.perf_counter()` at the request's arrival.
        remember: whether its states are cached, and cached ones are looked for.
    """

    image_digest: bytes | None
    pixels: np.ndarray | None
    segments: tuple[Segment, ...]
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    mask: FormMask | None = None
    top_logprobs: int | None = None
    arrived: float = field(default_factory=time.perf_counter)
    remember: bool = True


@dataclass(frozen=True)
class Finished:
    """The end of an answer. Times in milliseconds, from the request's arrival.

    Attributes:
        reason: "stop" at the end token or a stop string, "length" at the limit.
        image_tokens, prompt_tokens: visual tokens; all tokens of the prompt, visual ones included.
        cached_tokens, completion_tokens: tokens of the cached prefix; generated tokens.
        remembered: what the cached prefix covers.
        queue_ms, ttft_ms, tpot_ms: time in the queue; time to the first token (None for none); mean time of each further token
            (None for fewer than two).
        logprobs: of each generated token, where they were asked for.
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
    logprobs: tuple[TokenLogprobs, ...] = ()


# The result of a slice: nothing yet, a piece of text, or the end.
Slice = str | Finished | None


def answer_in_slices(session: Session, cache: PrefixCache, request: GenerationRequest) -> Generator[Slice, None, None]:
    """Generate an answer, one slice per item; `Finished` is the last. Closing the generator stops decoding.

    Raises:
        ImageEvicted: there is no cached state of the image, and its pixels are not given.
        InputError, MachineError: the decoder fails.
    """
    cache = cache if request.remember else PrefixCache(0)
    queue_ms = (time.perf_counter() - request.arrived) * 1e3
    decoder, segments = session.decoder, request.segments
    keys = list(prefix_keys(request.image_digest, segments))
    # The last segment is always read: a cached state has no logits.
    found = cache.longest(keys[:-1])
    image_tokens = 0 if request.image_digest is None else session.config.n_visual_tokens
    if found is None:
        start_at, remembered = 0, REMEMBERED[0]
        state = _initial_state(session, request)
        if request.image_digest is not None:
            cache.keep(keys[0], state, on_disk=True)
    else:
        start_at, kept = found
        state, remembered = decoder.new_state(like=kept), REMEMBERED[1 if start_at == 0 else 2]
    cached_tokens = 0 if found is None else state.n_tokens
    yield None
    logits = np.empty(0, np.float32)
    for segment in segments[start_at:]:
        for start in range(0, len(segment), CHUNK):
            logits = session.prefill(list(segment[start : start + CHUNK]), state)
            yield None
    # An answer is decoded token by token. Where a prefill of it would have other bits, its state is not cached.
    caches_answer = decoder.same_bits_however_cut and not request.stops
    if not caches_answer:
        cache.keep(keys[-1], state)
    prompt_tokens = state.n_tokens
    answer = session.generate(
        logits,
        state,
        request.max_new_tokens,
        request.sampling,
        began=request.arrived,
        mask=request.mask,
        top_logprobs=request.top_logprobs,
    )
    stopped = yield from _until_stop(answer, StopStrings(request.stops))
    if caches_answer:
        with suppress(MemoryError, MachineError):  # the answer is complete, whether or not it can be cached
            _cache_answer(session, cache, keys[-1], answer)
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
        tuple(answer.logprobs),
    )


def _initial_state(session: Session, request: GenerationRequest) -> DecoderState:
    if request.image_digest is None:
        return session.decoder.new_state()
    if request.pixels is None:
        raise ImageEvicted
    return session.look(Pixels(request.pixels))


def _until_stop(answer: Answer, stops: StopStrings) -> Generator[Slice, None, bool]:
    """Yield an answer up to a stop string; returns whether one ended it."""
    streamed = ""
    for piece in answer:
        streamed += piece
        yield stops.feed(piece) or None
        if stops.found:
            answer.stop()
            return True
    # Incomplete characters come at the end, as replacement characters.
    yield (stops.feed(answer.text.removeprefix(streamed)) + stops.rest()) or None
    return stops.found


def _cache_answer(session: Session, cache: PrefixCache, prompt_key: bytes, answer: Answer) -> None:
    """Cache the state after an answer, so that the next turn reads only its own tokens."""
    assert answer.state is not None
    if answer.unread:
        session.prefill(answer.unread, answer.state)
    if answer.tokens:
        prompt_key = longer_key(prompt_key, answer.tokens)
    cache.keep(prompt_key, answer.state)
