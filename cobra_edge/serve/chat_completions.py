"""POST /v1/chat/completions: the next answer of a conversation, whole or streamed."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ..decode.sampling import Sampling
from ..errors import InputError
from .address_policy import client_of
from .answer_form import answer_form
from .answer_stream import cancel_on_disconnect, stream_answer, with_deadline
from .conversation import characters_of, prefix_keys, read_conversation
from .errors import ApiError
from .event_loop import off_loop
from .event_stream import MEDIA_TYPE, EventStream
from .generation import Finished, GenerationRequest, ImageEvicted
from .image_decoding import ImageDecoder
from .image_input import ImageInput
from .limits import ImagePolicy, Limits
from .metrics import Metrics
from .middleware.metrics import CLIENT_GONE
from .prefix_cache import PrefixCache
from .reply import Reply
from .scheduler import Scheduler
from .schemas import (
    NO_LIMIT,
    UNSUPPORTED,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Delta,
    ErrorResponse,
)
from .served_model import ServedModel

_DEADLINE = "x-deadline-seconds"
_CHARACTERS_PER_TOKEN = 32  # far above the average of any language
_BYTES_PER_CHARACTER = 16  # tokenizing a character takes about as long as base64-decoding so many bytes


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A request without pixels, the files of its images, the cache keys of its prefixes, and what its reply says."""

    request: GenerationRequest
    images: tuple[bytes, ...]
    prefixes: tuple[bytes, ...]
    reply: Reply


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
    policy: ImagePolicy = "newest"

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
        reply = prepared.reply
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
        if not prepared.images or self.cache.holds(prepared.prefixes):
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
        assert self.decoder is not None
        return replace(prepared.request, pixels=await self.decoder.decode(address, *prepared.images))

    async def _events(self, reply: Reply, slices: AsyncGenerator[str | Finished, None]) -> AsyncGenerator[ChatChunk, None]:
        try:
            piece, text = await anext(slices), ""
            yield reply.chunk(Delta(role="assistant", content=""))
            while isinstance(piece, str):
                text += piece
                for chunk in reply.pieces(piece):
                    yield chunk
                piece = await anext(slices)
            self.metrics.answered(piece)
            for chunk in reply.ending(text, piece):
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
        """Validate and tokenize a request; its images are fetched but not decoded. Raises ApiError."""
        session, limits = self.model.session, self.limits
        self.model.require(chat.model)
        if chat.unsupported is not None:
            raise ApiError(400, _unsupported_message(chat.unsupported), "unsupported_value", chat.unsupported)
        form, mask = await to_thread.run_sync(answer_form, chat, session.form_mask)
        longest = min(session.config.max_length - 1, limits.prompt_tokens or session.config.max_length)
        characters = longest * _CHARACTERS_PER_TOKEN
        size = _BYTES_PER_CHARACTER * characters_of(chat.messages)
        conversation = await off_loop(
            size, read_conversation, chat.messages, session.template, session.codec, characters, self.policy
        )
        images, digest, image_tokens = list[bytes](), None, 0
        if conversation.image_urls:
            if self.decoder is None:
                message = f"{self.model.name} is a text-only model; leave the image out"
                raise ApiError(400, message, "image_not_supported", "messages")
            for url in conversation.image_urls:
                images.append(await self.images.read(url))
                if sum(map(len, images)) > max(limits.image_bytes, limits.body_bytes):
                    message = f"the images have more than {limits.body_bytes:,} bytes together; scale them down"
                    raise ApiError(413, message, "image_too_large", "messages")
            image_tokens = session.config.n_visual_tokens
            digest = await off_loop(sum(map(len, images)), _digest, images)
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
            mask,
            (chat.top_logprobs or 0) if chat.logprobs else None,
            arrived,
        )
        reply = Reply(
            self.model.name,
            self.model.fingerprint,
            bool(chat.stream_options and chat.stream_options.include_usage),
            form,
            session.codec if chat.logprobs else None,
            conversation.dropped_images,
        )
        return _Prepared(request, tuple(images), tuple(prefix_keys(digest, conversation.segments))[:-1], reply)


def _digest(files: Sequence[bytes]) -> bytes:
    """Return the SHA-256 of an image file; of several, that of theirs in order."""
    digests = [hashlib.sha256(file).digest() for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()


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
