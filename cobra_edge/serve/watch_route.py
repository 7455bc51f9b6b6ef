"""POST /v1/watch: the same question about every new frame of a camera or directory, as server-sent events; our own route."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

import anyio
import numpy as np
from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from ..decode.sampling import GREEDY
from ..errors import CobraEdgeError, InputError
from ..frames.source import Frame, Newest
from .address_policy import client_of
from .answer_stream import stream_answer
from .errors import ApiError
from .event_stream import MEDIA_TYPE, EventStream
from .generation import Finished, GenerationRequest
from .limits import Limits
from .metrics import Metrics
from .request_fields import IGNORED_REQUEST_FIELDS, RequestObject
from .scheduler import Scheduler, shutting_down
from .schemas import ErrorResponse, Text, TokenLimit, Whole
from .served_model import ServedModel
from .watch_sources import SharedSource

MOST_WATCHERS = 8  # each holds a thread while it waits for a frame
_MOST_FRAMES = 1_000_000
_TICK_SECONDS = 0.5  # in which a shutdown is noticed while no frame comes
_DEFAULT_TOKENS = 32


class WatchRequest(RequestObject):
    """What to ask about every new frame."""

    ignored_fields: ClassVar = IGNORED_REQUEST_FIELDS

    source: Text = Field(description="A name of the server's `--watch`.")
    prompt: Text
    model: Text | None = None
    max_tokens: TokenLimit = _DEFAULT_TOKENS
    frames: Whole | None = Field(default=None, ge=1, le=_MOST_FRAMES, description="End after so many answers.")
    on_change: bool | None = Field(default=None, description="Only answers that differ from the one before.")


class WatchSource(BaseModel):
    """A source."""

    id: str


class WatchSources(BaseModel):
    """The sources of this server."""

    data: list[WatchSource]


class FrameEvent(BaseModel):
    """The answer about one frame, or why there is none.

    Times are in milliseconds from the capture of the frame. `dropped` frames came while the answer before was written.
    """

    frame: int
    name: str | None
    answer: str | None
    finish_reason: str | None
    first_token_ms: float | None
    answer_ms: float
    dropped: int
    error: str | None = None


class WatchBegun(BaseModel):
    """The first event: the source is watched."""

    id: str
    source: str
    model: str


@dataclass(frozen=True, eq=False)
class WatchRoute:
    """The routes of watching."""

    model: ServedModel
    sources: Mapping[str, SharedSource]
    scheduler: Scheduler
    metrics: Metrics
    limits: Limits
    threads: anyio.CapacityLimiter

    def router(self) -> APIRouter:
        """Return the routes."""
        router, statuses = APIRouter(), (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
        described: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in statuses}
        stream: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}}
        router.add_api_route(
            "/v1/watch", self.watch, methods=["POST"], response_class=Response, responses=stream | described,
            summary="Ask the same about every new frame",
        )  # fmt: skip
        router.add_api_route(
            "/v1/watch", self.list_sources, methods=["GET"], response_model=WatchSources, summary="List the sources",
            responses={s: described[s] for s in (401, 403)},
        )  # fmt: skip
        return router

    async def list_sources(self) -> WatchSources:
        """Return the names that can be watched."""
        return WatchSources(data=[WatchSource(id=name) for name in self.sources])

    async def watch(self, asked: WatchRequest, request: Request) -> Response:
        """Stream an answer about each frame until the source ends, `frames` are answered or the client leaves."""
        session = self.model.session
        if asked.model is not None:
            self.model.require(asked.model)
        if asked.source not in self.sources:
            known = ", ".join(self.sources) or "none; start the server with --watch NAME=SOURCE"
            raise ApiError(404, f"no source {asked.source[:64]!r}; sources: {known}", "source_not_found", "source")
        if session.vision is None:
            raise ApiError(400, f"{self.model.name} is a text-only model", "image_not_supported", "source")
        if sum(source.watchers for source in self.sources.values()) >= MOST_WATCHERS:
            raise ApiError(429, f"{MOST_WATCHERS} clients are watching, the maximum; retry later", "too_many_watchers")
        try:
            tokens = tuple(session.codec.encode(session.template.first_turn(asked.prompt)))
        except InputError as error:
            raise ApiError(400, f"prompt: {error}", "invalid_value", "prompt") from error
        room = session.config.max_length - session.config.n_visual_tokens - len(tokens)
        if room < 1:
            raise ApiError(
                400, f"prompt: {len(tokens)} tokens do not fit after an image; shorten it", "context_length_exceeded"
            )
        limit = min(room if asked.max_tokens < 0 else asked.max_tokens, room, self.limits.new_tokens or room)
        begun = WatchBegun(id=f"watch-{secrets.token_hex(12)}", source=asked.source, model=self.model.name)
        return EventStream(begun, self._events(asked, tokens, limit, client_of(request.scope)))

    async def _events(
        self, asked: WatchRequest, tokens: tuple[int, ...], limit: int, address: str
    ) -> AsyncGenerator[BaseModel, None]:
        last, answered, told = 0, 0, None
        with self.sources[asked.source].watched() as newest:
            while asked.frames is None or answered < asked.frames:
                frame = await self._next(newest)
                if frame is None:
                    return
                event = await self._answer(frame, tokens, limit, address, frame.number - last - 1)
                last = frame.number
                del frame  # not held while waiting for the next one
                answered += event.answer is not None
                if not asked.on_change or event.answer != told or event.answer is None:
                    yield event
                told = event.answer

    async def _next(self, newest: Newest[Frame]) -> Frame | None:
        """Return the newest frame, or None at the end of the source. Raises ApiError where it is lost, or at a shutdown."""
        taking = asyncio.ensure_future(to_thread.run_sync(newest.take, abandon_on_cancel=True, limiter=self.threads))
        try:
            while not taking.done():
                await asyncio.wait({taking}, timeout=_TICK_SECONDS)
                if not self.scheduler.open:
                    raise shutting_down()
            return taking.result()
        except CobraEdgeError as error:
            raise ApiError(503, str(error), "source_lost", "source") from error
        finally:
            taking.cancel()

    async def _answer(self, frame: Frame, tokens: tuple[int, ...], limit: int, address: str, dropped: int) -> FrameEvent:
        event = functools.partial(FrameEvent, frame=frame.number, name=frame.name, dropped=dropped)
        try:
            pixels = await to_thread.run_sync(self._pixels, frame)
        except InputError as error:
            passed = (time.perf_counter() - frame.captured) * 1e3
            return event(answer=None, finish_reason=None, first_token_ms=None, answer_ms=passed, error=str(error))
        request = GenerationRequest(
            b"", pixels, (tokens,), limit, GREEDY, arrived=frame.captured, remember=False
        )  # from the capture on
        deadline = time.perf_counter() - frame.captured + self.limits.deadline_seconds
        text = ""
        async with aclosing(stream_answer(self.scheduler, (address, "watch"), request, deadline)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Finished):
                    self.metrics.answered(piece)
                    passed = (time.perf_counter() - frame.captured) * 1e3
                    return event(answer=text, finish_reason=piece.reason, first_token_ms=piece.ttft_ms, answer_ms=passed)
                text += piece
        raise AssertionError("the stream of an answer ended without Finished")

    def _pixels(self, frame: Frame) -> np.ndarray:
        return self.model.session.bundle.image().pixels(frame.image())
