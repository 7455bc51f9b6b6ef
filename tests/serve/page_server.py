"""A server without a model that speaks the API as the page needs it: every request is answered by a script of the test."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.page_route import page_router

from .browser_case import Seen

MODEL = "cobra-test"
DEMO = Path(__file__).parents[2] / "cobra_edge" / "mini" / "demo.png"


@dataclass
class Said:
    """An answer, streamed.

    Attributes:
        pieces: of text, an event each.
        remembered, cached, ttft_ms, tpot_ms, finish: what the end of the stream says.
        cut: bytes of each write to the connection; None for an event a write.
        line_end: of the events' lines.
        hold: before these pieces (by index), wait for `FakeServer.go_on`.
        error: said in the middle, after the pieces, instead of the end.
        breaks: whether the connection ends after the pieces, without a word.
    """

    pieces: tuple[str, ...] = ("A green star", " and a ", "cross.")
    remembered: str = "nothing"
    cached: int = 0
    ttft_ms: float = 180.0
    tpot_ms: float | None = 25.0
    finish: str = "stop"
    cut: int | None = None
    line_end: str = "\n"
    hold: tuple[int, ...] = ()
    error: str | None = None
    breaks: bool = False


@dataclass
class FakeServer:
    """What the tests see of it.

    Attributes:
        answers: what the next requests get, in order; when there are none left, a plain `Said()`.
        asked: bodies of the requests for an answer.
        aborted: set when a client went away in the middle of an answer.
        key: the API key that is asked for; None for none.
    """

    answers: list[Said | ApiError] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    aborted: threading.Event = field(default_factory=threading.Event)
    key: str | None = None
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.include_router(page_router())
        app.add_api_route("/v1/models", self._models)
        app.add_api_route("/v1/chat/completions", self._answer, methods=["POST"], response_model=None)
        return app

    def _error(self, request: Request) -> Response | None:
        given = request.headers.get("Authorization", "")
        if self.key is None or given.encode("latin-1") == f"Bearer {self.key}".encode():
            return None
        return error_response(ApiError(401, "no API key was given; send it as Authorization: Bearer KEY", "invalid_api_key"))

    async def _models(self, request: Request) -> Response:
        return self._error(request) or JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _answer(self, request: Request) -> Response:
        error = self._error(request)
        if error is not None:
            return error
        self.asked.append(await request.json())
        answer = self.answers.pop(0) if self.answers else Said()
        if isinstance(answer, ApiError):
            return error_response(answer)
        return StreamingResponse(self._stream(answer), media_type="text/event-stream; charset=utf-8")

    async def _stream(self, said: Said) -> AsyncIterator[bytes]:
        ended = False
        try:
            for index, piece in enumerate(said.pieces):
                while index in said.hold and not self.go_on.acquire(blocking=False):
                    await asyncio.sleep(0.005)
                async for part in written(said, chunk({"content": piece})):
                    yield part
            for event in [] if said.breaks else last_events(said):
                async for part in written(said, event):
                    yield part
            ended = True
        finally:
            if not ended:
                self.aborted.set()


def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps(
        {"id": "1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice], **more}, ensure_ascii=False
    )


def last_events(said: Said) -> list[str]:
    if said.error is not None:
        return [json.dumps({"error": {"message": said.error, "type": "server_error"}})]
    figures = {"remembered": said.remembered, "queue_ms": 0.4, "ttft_ms": said.ttft_ms, "tpot_ms": said.tpot_ms}
    details = {"cached_tokens": said.cached, "image_tokens": 64}
    usage = {"prompt_tokens": 83, "completion_tokens": len(said.pieces), "prompt_tokens_details": details}
    return [chunk({}, said.finish, cobra_edge=figures), json.dumps({"choices": [], "usage": usage}), "[DONE]"]


async def written(said: Said, event: str) -> AsyncIterator[bytes]:
    data = f"data: {event}{said.line_end * 2}".encode()
    step = said.cut or len(data)
    for start in range(0, len(data), step):
        yield data[start : start + step]
        await asyncio.sleep(0.001 if said.cut else 0)


def error_response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=dict(error.headers))


@contextmanager
def listening(app: Callable[..., Any]) -> Iterator[str]:
    """Serve an app from a thread at a free port; yields its address."""
    config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    with listening(server.app()) as server.url:
        yield server


@pytest.fixture
def visit(opened: Callable[..., Seen], fake: FakeServer) -> Callable[..., Seen]:
    """Open the page, and wait until it knows the model."""

    def visit_page(width: int = 1280, scheme: str = "light", **options: Any) -> Seen:
        seen = opened(fake.url + "/", width, scheme, **options)
        seen.page.locator("#model").get_by_text(MODEL).wait_for()
        return seen

    return visit_page


def ask(page: Any, question: str) -> Any:
    """Type a question, press Enter and return the turn, not waiting for its answer."""
    count = page.locator(".turn").count()
    page.fill("#question", question)
    page.keyboard.press("Enter")
    turn = page.locator(".turn").nth(count)
    turn.wait_for()
    return turn


def answered(page: Any, question: str) -> Any:
    """Ask, and wait for the answer's end."""
    turn = ask(page, question)
    turn.locator(".foot").wait_for()
    return turn


def complaints(seen: Seen) -> list[str]:
    """Return what the page complained of.

    Chromium now and then calls a stream aborted that was read to its end; that it was shows the answer.
    """
    return [text for text in seen.complaints if not text.endswith("/v1/chat/completions net::ERR_ABORTED")]


def show_demo(page: Any) -> None:
    page.set_input_files("#file", DEMO)
    page.locator("#current-image-name").get_by_text("demo.png").wait_for()
