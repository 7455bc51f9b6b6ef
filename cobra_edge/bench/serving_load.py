"""Many concurrent clients: throughput and latency, and a shutdown under load."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from ..errors import MachineError
from .serving_client import NO_RESPONSE, Reply, ask, client
from .serving_prefix_reuse import Step
from .serving_process import Server, served
from .serving_result import LoadFigures, LoadResult, ShutdownResult, Tail
from .serving_workload import Images, SimulatedClient
from .spread import spread

KNOWN_IMAGES = 16
_JITTER = 0.5  # share of Retry-After, so that clients do not all retry at once
_LONG_TOKENS = 64


def measure_load(bundle: Path, clients: int, seconds: float, waiting: int, on_step: Step) -> LoadResult:
    """Run clients for some time.

    Args:
        bundle: to serve.
        clients: concurrent ones; each sends a request when its last one is answered.
        seconds: for which requests are sent.
        waiting: length of the server's queue; shorter than the number of clients, so that some requests get 429.
        on_step: called with the stage, how much of it is done, and the total.

    Returns:
        Counts by status, throughput and latency.

    Raises:
        MachineError: a reply is neither an answer nor a 429 with Retry-After.
    """
    with served(bundle, "--waiting", str(waiting)) as server:
        on_step("load", 0, 1)
        replies, took = asyncio.run(_loaded(server, clients, seconds))
    figures = load_summary(replies, took)
    return LoadResult(clients=clients, waiting=waiting, **msgspec.structs.asdict(figures))


async def _loaded(server: Server, clients: int, seconds: float) -> tuple[list[Reply], float]:
    """Return all replies, and the seconds until the last one."""
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
                return  # reported by load_summary

    async with client(server.url, clients) as connections:
        await asyncio.gather(*(one(number) for number in range(clients)))
    return replies, max(reply.ended for reply in replies) - began


def load_summary(replies: Sequence[Reply], seconds: float) -> LoadFigures:
    """Aggregate replies. Raises MachineError for one that is neither an answer nor a 429 with Retry-After."""
    for reply in replies:
        refused = reply.status == 429 and reply.retry_after is not None
        if not (reply.answered or refused):
            raise MachineError(f"under load a request got {described(reply)}, expected 200, or 429 with Retry-After")
    answered = [reply for reply in replies if reply.answered]
    first = [reply.ttft_ms for reply in answered if reply.ttft_ms is not None]
    if not first:
        raise MachineError("no streamed answer arrived in time; increase --seconds")
    return LoadFigures(
        seconds=round(seconds, 2),
        statuses=statuses(replies),
        refused=len(replies) - len(answered),
        streamed=len(first),
        remembered=dict(sorted(Counter(reply.remembered for reply in answered).items())),
        requests_per_s=len(answered) / seconds,
        tokens_per_s=sum(reply.new_tokens for reply in answered) / seconds,
        ttft_ms=tail(first),
        latency_ms=tail([reply.latency_ms for reply in answered]),
    )


def tail(values: Sequence[float]) -> Tail:
    """Return median and 95th percentile."""
    return Tail(median(values), float(np.percentile(values, 95)))


def statuses(replies: Sequence[Reply]) -> dict[str, int]:
    """Return the number of replies by HTTP status; "none" counts those without a response."""
    counts = Counter("none" if reply.status == NO_RESPONSE else str(reply.status) for reply in replies)
    return dict(sorted(counts.items()))


def described(reply: Reply) -> str:
    """Describe a reply, for an error message."""
    status = "no response" if reply.status == NO_RESPONSE else str(reply.status)
    return f"{status} ({reply.failure or reply.text or 'without a reason'})"


def measure_shutdown(bundle: Path, clients: int, rounds: int, on_step: Step) -> ShutdownResult:
    """Send SIGTERM to servers under load.

    Args:
        bundle: to serve.
        clients: concurrent ones.
        rounds: servers to shut down.
        on_step: called with the stage, how much of it is done, and the total.

    Returns:
        Seconds from SIGTERM to exit, and the outcome of the requests.

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
    return ShutdownResult(
        clients=clients,
        rounds=rounds,
        seconds=spread(seconds),
        exit_code=0,
        under_way=under_way,
        statuses=statuses(replies),
        cut=0,
    )


async def _ended(server: Server, clients: int) -> tuple[list[Reply], float, float]:
    """Return all replies, and the times of SIGTERM and of the exit. Raises MachineError for an exit code other than 0."""
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
            if reply.status == 503 or reply.failure is not None:
                return
            if reply.status == 429:
                await asyncio.sleep(0.05)

    # Without keep-alive: an idle connection closed at shutdown could not be told from an answer that is cut off.
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
        raise MachineError(f"the server exited with {code} after SIGTERM, expected 0")
    return replies, asked_at, ended_at


def check_shutdown(replies: Sequence[Reply], asked_at: float) -> None:
    """Check that every request was answered completely or refused; one sent after SIGTERM may fail to connect.

    Raises:
        MachineError: an answer was cut off, or a request sent before SIGTERM got no response.
    """
    for reply in replies:
        if reply.failure is None and reply.status in (200, 429, 503):
            continue
        early_seconds = asked_at - reply.began
        if reply.status != NO_RESPONSE or early_seconds > 0:
            when = "before" if early_seconds > 0 else "after"
            raise MachineError(
                f"a request sent {abs(early_seconds):.2f} s {when} SIGTERM got {described(reply)}, expected a complete answer, "
                "or 503 if it had not started"
            )
