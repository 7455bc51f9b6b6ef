"""POST /v1/chat/completions: the next answer of a conversation, whole or streamed."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..decode.sampling import Sampling
from ..errors import InputError
from .address_policy import client_of
from .answer_stream import cancel_on_disconnect, stream_answer, with_deadline
from .conversation import characters_of, prefix_keys, read_conversation
from .errors import ApiError
from .event_loop import off_loop
from .event_stream import MEDIA_TYPE, EventStream
from .generation import Finished, GenerationRequest, ImageEvicted
from .image_decoding import ImageDecoder
from .image_input import ImageInput
from .limits import Limits
from .metrics import Metrics
from .middleware.metrics import CLIENT_GONE
from .prefix_cache import PrefixCache
from .scheduler import Scheduler
from .schemas import (
    NO_LIMIT,
    UNSUPPORTED,
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorResponse,
    Figures,
    PromptDetails,
    Usage,
)
from .served_model import ServedModel

_DEADLINE = "x-deadline-seconds"
_CHARACTERS_PER_TOKEN = 32  # far above the average of any language
_BYTES_PER_CHARACTER = 16  # tokenizing a character takes about as long as base64-decoding so many bytes


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A request without pixels, the image file or None, and the cache keys of its prefixes."""

    request: GenerationRequest
    image: bytes | None
    prefixes: tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class ChatRoute:
    """The chat route. `decoder` decodes images, None for a text-only model; `cache` is the scheduler's prefix cache."""

    model: ServedModel
    images: ImageInput
    decoder: ImageDecoder | None
    cache: PrefixCache
    scheduler: Scheduler
    metrics: Metrics
    limits: Limits

    def router(self) -> APIRouter:
        """Return the route, with its responses for the OpenAPI document."""
        router = APIRouter()
        statuses = {400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504}
        errors: dict[int | str, dict[str, Any]] = {s: {"model": ErrorResponse} for s in sorted(statuses)}
        description = "A chat.completion.chunk as JSON; the last is [DONE], or an error as JSON."
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string", "description": description}}}
        stream = {"itemSchema": event}  # schema of each event, as in OpenAPI 3.2
        router.add_api_route(
            "/v1/chat/completions",
            self.complete,
            methods=["POST"],
            response_model=ChatCompletion,
            responses={200: {"content": {MEDIA_TYPE: stream}}, **errors},
            summary="Answer a conversation",
        )
        return router

    async def complete(self, chat: ChatRequest, request: Request) -> Response:
        """Answer a conversation; with `stream`, as server-sent events."""
        arrived = time.perf_counter()
        try:
            return await cancel_on_disconnect(request.receive, self._answer(chat, request, arrived))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)

    async def _answer(self, chat: ChatRequest, request: Request, arrived: float) -> Response:
        deadline = self._deadline(request)
        address = client_of(request.scope)
        prepared = await with_deadline(deadline, arrived, self._prepare(chat, arrived))
        slices = self._slices(prepared, (address, chat.user or chat.safety_identifier or ""), deadline)
        reply = _Reply(self.model.name, self.model.fingerprint, bool(chat.stream_options and chat.stream_options.include_usage))
        if not chat.stream:
            whole = await _collected(slices)
            self.metrics.answered(whole[1])
            return JSONResponse(reply.whole(*whole).model_dump())
        # Nothing is sent before the first piece: until then an error gets its own HTTP status.
        events = self._events(reply, slices)
        return EventStream(await anext(events), events)

    async def _slices(
        self, prepared: _Prepared, owner: tuple[str, str], deadline: float
    ) -> AsyncGenerator[str | Finished, None]:
        """Yield the pieces of an answer. An image whose state is cached is decoded only where that was evicted meanwhile."""
        if prepared.image is None or self.cache.holds(prepared.prefixes):
            try:
                async with aclosing(stream_answer(self.scheduler, owner, prepared.request, deadline)) as slices:
                    async for piece in slices:
                        yield piece
                return
            except ImageEvicted:  # nothing was yielded: it is raised before the first token
                pass
        request = await with_deadline(deadline, prepared.request.arrived, self._with_pixels(prepared, owner[0]))
        async with aclosing(stream_answer(self.scheduler, owner, request, deadline)) as slices:
            async for piece in slices:
                yield piece

    async def _with_pixels(self, prepared: _Prepared, address: str) -> GenerationRequest:
        assert prepared.image is not None and self.decoder is not None
        return replace(prepared.request, pixels=await self.decoder.decode(address, prepared.image))

    async def _events(self, reply: _Reply, slices: AsyncGenerator[str | Finished, None]) -> AsyncGenerator[ChatChunk, None]:
        try:
            piece = await anext(slices)
            yield reply.chunk(Delta(role="assistant", content=""))
            while isinstance(piece, str):
                yield reply.chunk(Delta(content=piece))
                piece = await anext(slices)
            self.metrics.answered(piece)
            for chunk in reply.ending(piece):
                yield chunk
        finally:
            await slices.aclose()

    def _deadline(self, request: Request) -> float:
        """Return the deadline in seconds: the client's, at most the server's."""
        given = request.headers.get(_DEADLINE)
        if given is None:
            return self.limits.deadline_seconds
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            message = f"X-Deadline-Seconds is {given[:40]!r}, expected a number above 0; leave it out"
            raise ApiError(400, message, "invalid_value", _DEADLINE)
        return min(seconds, self.limits.deadline_seconds)

    async def _prepare(self, chat: ChatRequest, arrived: float) -> _Prepared:
        """Validate and tokenize a request; its image is fetched but not decoded. Raises ApiError."""
        session, limits = self.model.session, self.limits
        self.model.require(chat.model)
        if chat.unsupported is not None:
            raise ApiError(400, _unsupported_message(chat.unsupported), "unsupported_value", chat.unsupported)
        longest = min(session.config.max_length - 1, limits.prompt_tokens or session.config.max_length)
        characters = longest * _CHARACTERS_PER_TOKEN
        size = _BYTES_PER_CHARACTER * characters_of(chat.messages)
        conversation = await off_loop(size, read_conversation, chat.messages, session.template, session.codec, characters)
        image, digest, image_tokens = None, None, 0
        if conversation.image_url is not None:
            if self.decoder is None:
                message = f"{self.model.name} is a text-only model; leave the image out"
                raise ApiError(400, message, "image_not_supported", "messages")
            image, image_tokens = await self.images.read(conversation.image_url), session.config.n_visual_tokens
            digest = await off_loop(len(image), _digest, image)
        prompt_tokens = image_tokens + sum(map(len, conversation.segments))
        room = session.config.max_length - prompt_tokens
        if prompt_tokens > longest:
            message = (
                f"the conversation has {prompt_tokens} tokens ({image_tokens} of the image), at most {longest} fit; shorten it"
            )
            raise ApiError(400, message, "context_length_exceeded", "messages")
        wanted = chat.token_limit or limits.default_new_tokens
        request = GenerationRequest(
            digest,
            None,
            conversation.segments,
            min(room if wanted == NO_LIMIT else wanted, room, limits.new_tokens or room),
            _sampling(chat),
            chat.stops,
            arrived,
        )
        return _Prepared(request, image, tuple(prefix_keys(digest, conversation.segments))[:-1])


def _digest(file: bytes) -> bytes:
    return hashlib.sha256(file).digest()


def _unsupported_message(name: str) -> str:
    unsupported = UNSUPPORTED[name]
    supported = " or ".join(json.dumps(value) for value in unsupported.neutral)
    problem = f"only {supported} is supported" if supported else "is not supported"
    return f"{name}: {problem}; {unsupported.advice}"


def _sampling(chat: ChatRequest) -> Sampling:
    """Return the sampling parameters: greedy by default; a random seed where none is given.

    A top_p of 0 leaves only the most probable token, so it is greedy too.
    """
    seed = secrets.randbits(64) if chat.seed is None else chat.seed % (1 << 64)
    temperature = 0.0 if chat.top_p == 0 else chat.temperature or 0.0
    try:
        return Sampling(temperature, max(chat.top_k or 0, 0), chat.top_p or 1.0, seed)
    except InputError as error:
        raise ApiError(400, str(error), "invalid_value") from error


async def _collected(slices: AsyncGenerator[str | Finished, None]) -> tuple[str, Finished]:
    """Return the whole answer."""
    text = ""
    try:
        async for piece in slices:
            if isinstance(piece, Finished):
                return text, piece
            text += piece
    finally:
        await slices.aclose()
    raise AssertionError("the stream of an answer ended without Finished")


@dataclass(frozen=True)
class _Reply:
    """The fields that all parts of one response have in common."""

    model: str
    fingerprint: str
    include_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _parts(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}

    def whole(self, text: str, end: Finished) -> ChatCompletion:
        choice = Choice(message=AnswerMessage(content=text), finish_reason=end.reason)
        return ChatCompletion(**self._parts(), choices=[choice], usage=_usage(end), cobra_edge=_figures(end))

    def chunk(self, delta: Delta) -> ChatChunk:
        return ChatChunk(**self._parts(), choices=[ChunkChoice(delta=delta)])

    def ending(self, end: Finished) -> list[ChatChunk]:
        choice = ChunkChoice(delta=Delta(), finish_reason=end.reason)
        chunks = [ChatChunk(**self._parts(), choices=[choice], cobra_edge=_figures(end))]
        if self.include_usage:
            chunks.append(ChatChunk(**self._parts(), choices=[], usage=_usage(end)))
        return chunks


def _usage(end: Finished) -> Usage:
    return Usage(
        prompt_tokens=end.prompt_tokens,
        completion_tokens=end.completion_tokens,
        total_tokens=end.prompt_tokens + end.completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=end.cached_tokens, image_tokens=end.image_tokens),
    )


def _figures(end: Finished) -> Figures:
    return Figures(remembered=end.remembered, queue_ms=end.queue_ms, ttft_ms=end.ttft_ms, tpot_ms=end.tpot_ms)
