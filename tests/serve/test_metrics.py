"""Every question is counted once, by how it ended, whatever that was."""

import asyncio
import functools
from contextlib import suppress

import httpx
import pytest

from cobra_edge.serve.errors import ApiError
from cobra_edge.serve.event_stream import EventStream
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.middleware.admission import Admission
from cobra_edge.serve.middleware.metrics import CLIENT_GONE, MetricsMiddleware
from cobra_edge.serve.middleware.stack import with_middleware
from cobra_edge.serve.schemas import ErrorBody

from .serve_case import PATIENCE, metric, question, served, until

REFUSED = ApiError(404, "no such model", "model_not_found")
EVENT = ErrorBody(message="a", type="b", param=None, code=None)
JSON = [(b"content-type", b"application/json"), (b"host", b"localhost")]
KEY = (b"authorization", b"Bearer key")


async def nothing(*_arguments):
    await asyncio.Event().wait()


async def gone():
    return {"type": "http.disconnect"}


def whole_body(*parts):
    """Return a `receive` that gives a body's parts, then nothing."""
    messages = [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]

    async def receive():
        return messages.pop(0) if messages else await nothing()

    return receive


async def answering(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body"})


def counted(app, receive=nothing, method="POST", headers=JSON):
    """Return what a request is counted as, a list."""
    counts = []

    async def send(_message):
        pass

    async def ask():
        scope = {"type": "http", "method": method, "path": "/v1/chat/completions", "headers": headers}
        with suppress(ZeroDivisionError):
            await asyncio.wait_for(MetricsMiddleware(app, counts.append)(scope, receive, send), 10)

    asyncio.run(ask())
    return counts


@pytest.mark.parametrize(
    ("error", "receive", "status"),
    [(None, nothing, 200), (ZeroDivisionError, nothing, 500), (REFUSED, nothing, 404), (None, gone, CLIENT_GONE)],
)
def test_a_stream_is_counted_by_how_it_ended_not_by_how_it_began(error, receive, status):
    closed = []

    async def events():
        try:
            yield EVENT  # the first, which is not from here any more when the stream begins
            if receive is gone:
                await nothing()
            yield EVENT
            if error is not None:
                raise error
        finally:
            closed.append(True)

    async def app(scope, receive, send):
        pieces = events()
        await EventStream(await anext(pieces), pieces)(scope, receive, send)

    assert (counted(app, receive), closed) == ([status], [True])


@pytest.mark.parametrize(
    ("headers", "receive", "status"),
    [
        ([], nothing, 403),
        ([JSON[1], KEY], nothing, 415),
        (JSON, nothing, 401),
        ([*JSON, KEY], whole_body(b"12345", b"67890"), 413),
        ([*JSON, KEY], gone, CLIENT_GONE),
        ([*JSON, KEY], whole_body(b"1"), 200),
    ],
)
def test_a_request_rejected_by_middleware_is_counted(headers, receive, status):
    app = with_middleware(answering, Limits(body_bytes=8), key="key", hosts=["localhost"])
    assert counted(app, receive, headers=headers) == [status]


def test_a_request_beyond_capacity_is_counted():
    assert counted(with_middleware(answering, Limits(), admission=Admission(0))) == [429]


def test_what_asks_for_nothing_is_not_counted():
    assert counted(answering, method="GET") == []


def test_a_disconnect_before_the_answer_is_counted_as_499():
    async def left(scope, receive, send):
        raise ZeroDivisionError

    assert counted(left) == [CLIENT_GONE]


def test_a_server_counts_them(tiny_bundle):
    with served(tiny_bundle) as server:
        total = functools.partial(metric, server.url)
        asked = {"model": "mamba-tiny", "messages": [question("a")], "max_tokens": 1}
        post = functools.partial(httpx.post, f"{server.url}/v1/chat/completions", timeout=PATIENCE)
        for changed, status in (
            ({}, 200),
            ({"model": "b"}, 404),
            ({"n": 2}, 400),
            ({"seed": "b"}, 400),
            ({"stream": True}, 200),
        ):
            assert post(json=asked | changed).status_code == status
        assert post(content=b"{}").status_code == 415
        expected = {"200": 2, "400": 2, "404": 1, "415": 1}
        until(lambda: {s: total(f'cobra_edge_requests_total{{status="{s}"}}') for s in expected} == expected, "the counts")
