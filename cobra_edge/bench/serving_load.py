"""Many clients at the same time: how much is answered, how soon, and how a server ends in the middle of it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import MachineError
from .serving_client import NO_RESPONSE, Reply, ask, client
from .serving_prefix_reuse import Step
from .serving_process import Server, served
from .serving_workload import Images, SimulatedClient
from .spread import spread

KNOWN_IMAGES = 16
_JITTER = 0.5  # of what a refused client is asked to wait, so that they do not all come back at once
_LONG_TOKENS = 64
_TAIL = 95


def measure_load(bundle: Path, clients: int, seconds: float, waiting: int, on_step: Step) -> dict[str, Any]:
    """Let clients ask for a while.

    Args:
        bundle: what is served.
        clients: at the same time, each waiting for its answer.
        seconds: in which questions are asked.
        waiting: requests that may wait at the server; fewer than clients, so that some are told to come again.
        on_step: told a stage's name, how much of it is done, and of what.

    Returns:
        Counts by status, rates, and times.

    Raises:
        MachineError: a request got something else than an answer or a 429 that says when to come again.
    """
    with served(bundle, "--waiting", str(waiting)) as server:
        on_step("load", 0, 1)
        replies, took = asyncio.run(_loaded(server, clients, seconds))
    return {"clients": clients, "waiting": waiting} | load_summary(replies, took)


async def _loaded(server: Server, clients: int, seconds: float) -> tuple[list[Reply], float]:
    """Return all replies, and the seconds until the last of them."""
    model, images = server.model(), Images(KNOWN_IMAGES)
    replies: list[Reply] = []
    began = time.perf_counter()

    async def one(number: int) -> None:
        simulated_client = SimulatedClient(images, random.Random(number))
        while time.perf_counter() - began < seconds:
            question = simulated_client.next()
            reply = await ask(connections, model, question)
            simulated_client.record(question, reply)
            replies.append(reply)
            if reply.status == 429 and reply.retry_after is not None:
                wait = reply.retry_after * (1 + simulated_client.random.uniform(0, _JITTER))
                await asyncio.sleep(min(wait, max(0.0, seconds - (time.perf_counter() - began))))
            elif not reply.answered:
                return  # found out below

    async with client(server.url, clients) as connections:
        await asyncio.gather(*(one(number) for number in range(clients)))
    return replies, max(reply.ended for reply in replies) - began


def load_summary(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Return what is kept of a load. Raises MachineError for a reply that is neither an answer nor a 429 with Retry-After."""
    for reply in replies:
        refused = reply.status == 429 and reply.retry_after is not None
        if not (reply.answered or refused):
            raise MachineError(f"under load a request got {described(reply)}, expected 200, or 429 with Retry-After")
    answered = [reply for reply in replies if reply.answered]
    first = [reply.ttft_ms for reply in answered if reply.ttft_ms is not None]
    if not first:
        raise MachineError("no streamed answer came in that time; give more --seconds")
    return {
        "seconds": round(seconds, 2),
        "statuses": statuses(replies),
        "refused": len(replies) - len(answered),
        "streamed": len(first),
        "remembered": dict(sorted(Counter(reply.remembered for reply in answered).items())),
        "requests_per_s": len(answered) / seconds,
        "tokens_per_s": sum(reply.new_tokens for reply in answered) / seconds,
        "ttft_ms": tail(first),
        "latency_ms": tail([reply.latency_ms for reply in answered]),
    }


def tail(values: Sequence[float]) -> dict[str, float]:
    """Return median and 95th percentile."""
    return {"median": median(values), f"p{_TAIL}": float(np.percentile(values, _TAIL))}


def statuses(replies: Sequence[Reply]) -> dict[str, int]:
    """Return how many replies had each status; those without one under "none"."""
    counts = Counter("none" if reply.status == NO_RESPONSE else str(reply.status) for reply in replies)
    return dict(sorted(counts.items()))


def described(reply: Reply) -> str:
    """Say what came, for an error."""
    status = "no response" if reply.status == NO_RESPONSE else str(reply.status)
    return f"{status} ({reply.flaw or reply.text or 'without a reason'})"


def measure_shutdown(bundle: Path, clients: int, rounds: int, on_step: Step) -> dict[str, Any]:
    """End servers while clients ask them.

    Args:
        bundle: what is served.
        clients: at the same time.
        rounds: servers.
        on_step: told a stage's name, how much of it is done, and of what.

    Returns:
        Seconds from SIGTERM to the end of the process, and what became of the requests.

    Raises:
        MachineError: an exit code other than 0, or as `check_shutdown` raises.
    """
    seconds: list[float] = []
    replies: list[Reply] = []
    under_way = 0
    for number in range(rounds):
        on_step("shutdown", number, rounds)
        with served(bundle) as server:
            found, asked_at, ended_at = asyncio.run(_ended(server, clients))
        check_shutdown(found, asked_at)
        seconds.append(ended_at - asked_at)
        under_way += sum(reply.began < asked_at < reply.ended for reply in found)
        replies += found
    return {
        "clients": clients,
        "rounds": rounds,
        "seconds": spread(seconds),
        "exit_code": 0,
        "under_way": under_way,
        "statuses": statuses(replies),
        "cut": 0,
    }


async def _ended(server: Server, clients: int) -> tuple[list[Reply], float, float]:
    """Return all replies, when SIGTERM was sent and when the process had ended. Raises MachineError for its exit code."""
    model, images = server.model(), Images(KNOWN_IMAGES)
    replies: list[Reply] = []
    answered = asyncio.Event()

    async def one(number: int) -> None:
        simulated_client = SimulatedClient(images, random.Random(number), _LONG_TOKENS)
        while True:
            reply = await ask(connections, model, simulated_client.next())
            replies.append(reply)
            if len(replies) > clients:
                answered.set()
            if reply.status == 503 or reply.flaw is not None:
                return
            if reply.status == 429:
                await asyncio.sleep(0.05)

    # Without connections that are kept: one that the server closes as it ends could not be told from one that it cut.
    async with client(server.url, clients, keep_alive=False) as connections:
        asking: asyncio.Future[Any] = asyncio.gather(*(one(number) for number in range(clients)))
        begun: asyncio.Future[Any] = asyncio.ensure_future(answered.wait())
        await asyncio.wait((begun, asking), return_when=asyncio.FIRST_COMPLETED)
        begun.cancel()
        asked_at = time.perf_counter()
        server.ask_to_end()
        code = await asyncio.to_thread(server.ended)
        ended_at = time.perf_counter()
        await asking
    if code:
        raise MachineError(f"SIGTERM ended the server with exit code {code}, expected 0")
    return replies, asked_at, ended_at


def check_shutdown(replies: Sequence[Reply], asked_at: float) -> None:
    """See that every request was answered whole or refused; one that was sent after SIGTERM may find the door closed.

    Raises:
        MachineError: a request was cut, or sent before SIGTERM and got no response.
    """
    for reply in replies:
        if reply.flaw is None and reply.status in (200, 429, 503):
            continue
        early_seconds = asked_at - reply.began
        if reply.status != NO_RESPONSE or early_seconds > 0:
            when = "before" if early_seconds > 0 else "after"
            raise MachineError(
                f"a request sent {abs(early_seconds):.2f} s {when} SIGTERM got {described(reply)}, expected a whole answer, or "
                "503 where it was not begun"
            )
