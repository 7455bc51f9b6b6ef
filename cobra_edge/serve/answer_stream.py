"""Streams answers from the scheduler's thread to the event loop, with deadlines and cancellation on disconnect."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from .errors import ApiError
from .generation import Finished, GenerationRequest
from .scheduler import Event, Scheduler, Ticket

T = TypeVar("T")


def deadline_exceeded(seconds: float) -> ApiError:
    """Return the error of an answer that exceeds its deadline."""
    message = f"no answer within {seconds:g} s; ask for fewer tokens, send a smaller image, or retry when the load is lower"
    return ApiError(504, message, "deadline_exceeded")


async def with_deadline(deadline_seconds: float, arrived: float, work: Awaitable[T]) -> T:
    """Return the result of the work, which is cancelled at the deadline.

    Args:
        deadline_seconds: from the request's arrival.
        arrived: `time.perf_counter()` at the arrival.
        work: coroutine on the event loop.

    Raises:
        ApiError: 504, the deadline is exceeded.
    """
    try:
        with anyio.fail_after(max(0.0, deadline_seconds - (time.perf_counter() - arrived))):
            return await work
    except TimeoutError as error:
        raise deadline_exceeded(deadline_seconds) from error


async def stream_answer(
    scheduler: Scheduler, owner: tuple[str, ...], request: GenerationRequest, deadline_seconds: float
) -> AsyncGenerator[str | Finished, None]:
    """Yield pieces of the answer, then its end. Closing the generator stops decoding.

    Args:
        scheduler: generates the answer.
        owner: of the request, for fairness, see `FairQueue`.
        request: what to generate.
        deadline_seconds: from the request's arrival.

    Raises:
        ApiError: the request failed, or the deadline is exceeded.
    """
    loop, arrival = asyncio.get_running_loop(), asyncio.Event()
    events: deque[Event] = deque()

    def on_event(event: Event) -> None:
        events.append(event)
        with suppress(RuntimeError):  # the loop is closed, as at the end of a shutdown
            loop.call_soon_threadsafe(arrival.set)

    left = deadline_seconds - (time.perf_counter() - request.arrived)
    if left <= 0:  # a timer of the loop would fire after the scheduler's events
        raise deadline_exceeded(deadline_seconds)
    ticket = Ticket(owner, request, on_event)
    scheduler.submit(ticket)
    timer = loop.call_later(left, on_event, deadline_exceeded(deadline_seconds))
    try:
        while True:
            await arrival.wait()
            arrival.clear()
            text, end = _drain(events)
            if text:
                yield text
            if isinstance(end, ApiError):
                raise end
            if end is not None:
                yield end
                return
            # Nothing above suspends where pieces come faster than they are sent; a disconnect would go unnoticed.
            await asyncio.sleep(0)
    finally:
        timer.cancel()
        scheduler.cancel(ticket)


def _drain(events: deque[Event]) -> tuple[str, Finished | ApiError | None]:
    """Remove all events up to an end; consecutive pieces are joined."""
    text = ""
    while events:
        event = events.popleft()
        if not isinstance(event, str):
            return text, event
        text += event
    return text, None


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of the work, which is cancelled when the client disconnects. The request's body must have been read.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    working, disconnecting = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
