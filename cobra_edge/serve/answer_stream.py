"""From the scheduler's thread to the event loop: an answer as it comes, to its end, its deadline, or its reader's departure."""

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

from .errors import Refusal
from .generation import Finished, Question
from .scheduler import Event, Scheduler, Ticket

T = TypeVar("T")


def deadline_exceeded(seconds: float) -> Refusal:
    """Return what is said when an answer takes too long."""
    message = f"no answer within {seconds:g} s; ask for fewer tokens, send a smaller image, or ask when less is going on"
    return Refusal(504, message, "deadline_exceeded")


async def with_deadline(deadline_seconds: float, arrived: float, work: Awaitable[T]) -> T:
    """Return what the work comes to; it is cancelled at the deadline.

    Args:
        deadline_seconds: from the arrival on.
        arrived: `time.perf_counter()` then.
        work: on the event loop.

    Raises:
        Refusal: it is not done in time.
    """
    try:
        with anyio.fail_after(max(0.0, deadline_seconds - (time.perf_counter() - arrived))):
            return await work
    except TimeoutError as error:
        raise deadline_exceeded(deadline_seconds) from error


async def stream_answer(
    scheduler: Scheduler, owner: tuple[str, ...], question: Question, deadline_seconds: float
) -> AsyncGenerator[str | Finished, None]:
    """Yield pieces of the answer, and its end. Closing the generator stops the decoding.

    Args:
        scheduler: answers.
        owner: whose turn it is, for fairness.
        question: what is asked.
        deadline_seconds: from the question's arrival.

    Raises:
        Refusal: it is not answered, or not in time.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    heard: deque[Event] = deque()

    def hear(event: Event) -> None:
        heard.append(event)
        with suppress(RuntimeError):  # the loop is closed: the server is gone, and its clients are
            loop.call_soon_threadsafe(news.set)

    left = deadline_seconds - (time.perf_counter() - question.arrived)
    if left <= 0:  # the loop's clock would be heard after what the scheduler says meanwhile
        raise deadline_exceeded(deadline_seconds)
    ticket = Ticket(owner, question, hear)
    scheduler.submit(ticket)
    clock = loop.call_later(left, hear, deadline_exceeded(deadline_seconds))
    try:
        while True:
            await news.wait()
            news.clear()
            text, end = _taken(heard)
            if text:
                yield text
            if isinstance(end, Refusal):
                raise end
            if end is not None:
                yield end
                return
            # Where pieces come faster than they are sent nothing above waits, and a departure would not be noticed.
            await asyncio.sleep(0)
    finally:
        clock.cancel()
        scheduler.cancel(ticket)


def _taken(heard: deque[Event]) -> tuple[str, Finished | Refusal | None]:
    """Take out all that was heard up to an end: pieces that came together are one."""
    text = ""
    while heard:
        event = heard.popleft()
        if not isinstance(event, str):
            return text, event
        text += event
    return text, None


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work comes to; it is cancelled when the client goes away. The request's body must have been read.

    Raises:
        ClientDisconnect: the client went away.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
