"""Every question is counted once, by how it ended, whatever that was."""

import asyncio
from contextlib import suppress
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect

from cobra_edge.serve.chat_route import ChatRoute
from cobra_edge.serve.event_stream import CLIENT_GONE, EventStream
from cobra_edge.serve.limits import Limits
from cobra_edge.serve.metrics import Metrics
from cobra_edge.serve.openai_api import ChatRequest, ErrorBody
from cobra_edge.serve.refusals import Refusal
from cobra_edge.serve.state_cache import StateCache

REFUSED = Refusal(404, "no such model", "model_not_found")


async def nothing(*_arguments):
    await asyncio.Event().wait()


async def gone():
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, 500), (REFUSED, 404), (ClientDisconnect, CLIENT_GONE)])
def test_a_question_that_fails_is_counted(error, status):
    def require(_name):
        raise error

    metrics = Metrics.of(StateCache(0), int, int)
    route = ChatRoute(SimpleNamespace(require=require, session=None), None, None, metrics, Limits())
    request = SimpleNamespace(receive=nothing, headers={}, client=None)
    asked = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}]})
    if status == CLIENT_GONE:
        asyncio.run(route.complete(asked, request))
    else:
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            asyncio.run(route.complete(asked, request))
    counted = {s.labels["status"]: s.value for m in metrics.requests.collect() for s in m.samples if s.name.endswith("_total")}
    assert counted == {str(status): 1}


@pytest.mark.parametrize(
    ("error", "receive", "status"),
    [(None, nothing, 200), (ZeroDivisionError, nothing, 500), (REFUSED, nothing, 404), (None, gone, CLIENT_GONE)],
)
def test_a_stream_tells_how_it_ended(error, receive, status):
    ended, closed = [], []
    event = ErrorBody(message="a", type="b", param=None, code=None)

    async def events():
        try:
            yield event  # the first, which is not from here any more when the stream begins
            if receive is gone:
                await nothing()
            yield event
            if error is not None:
                raise error
        finally:
            closed.append(True)

    async def send(_message):
        pass

    async def streamed():
        pieces = events()
        stream = EventStream(await anext(pieces), pieces, ended.append)
        with suppress(ZeroDivisionError):
            await asyncio.wait_for(stream({"type": "http"}, receive, send), 10)

    asyncio.run(streamed())
    assert (ended, closed) == ([status], [True])
