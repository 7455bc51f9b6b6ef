"""Growth of a server's resident memory over many requests."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from ..errors import MachineError
from .serving_client import Reply, ask, client
from .serving_load import described
from .serving_prefix_reuse import Step
from .serving_process import Resident, Server, served
from .serving_result import MemoryFigures, MemoryResult, MemorySample, Slope
from .serving_workload import Images, SimulatedClient

WARM_UP = 100
SAMPLE_EVERY = 100
_CACHE_MIB = 4
_KNOWN_IMAGES = 64  # more than fit the cache
_CLIENTS = 4
_MAX_TOKENS = 4


def measure_memory(bundle: Path, requests: int, on_step: Step) -> MemoryResult:
    """Measure a server's resident memory after every hundredth request, with a prefix cache so small that it evicts.

    Args:
        bundle: to serve.
        requests: after the warm-up; a multiple of SAMPLE_EVERY.
        on_step: called with the stage, how much of it is done, and the total.

    Raises:
        MachineError: a request got no answer, or nothing was evicted.
    """
    with served(bundle, "--state-cache-mib", str(_CACHE_MIB)) as server:
        before = server.resident()
        samples, replies = asyncio.run(_sampled(server, requests, on_step))
        evicted = server.counted("cobra_edge_state_cache_evicted_total")
    if not evicted:
        raise MachineError(
            f"a prefix cache of {_CACHE_MIB} MiB evicted nothing in {len(replies)} requests; increase --requests"
        )
    figures = msgspec.structs.asdict(memory_summary(before, samples, replies))
    return MemoryResult(state_cache_mib=_CACHE_MIB, known_images=_KNOWN_IMAGES, evicted=evicted, **figures)


async def _sampled(server: Server, requests: int, on_step: Step) -> tuple[list[tuple[int, Resident]], list[Reply]]:
    """Return resident memory by number of requests, and all replies."""
    model, images, total = server.model(), Images(_KNOWN_IMAGES), WARM_UP + requests
    simulated_clients = [SimulatedClient(images, random.Random(number), _MAX_TOKENS) for number in range(_CLIENTS)]
    samples: list[tuple[int, Resident]] = []
    replies: list[Reply] = []

    async def some(simulated_client: SimulatedClient, count: int) -> None:
        for _ in range(count):
            question = simulated_client.next()
            reply = await ask(connections, model, question)
            simulated_client.record(question, reply)
            replies.append(reply)

    async with client(server.url, _CLIENTS) as connections:
        while len(replies) < total:
            size = WARM_UP if not samples else SAMPLE_EVERY
            await asyncio.gather(*(some(simulated_client, size // _CLIENTS) for simulated_client in simulated_clients))
            samples.append((len(replies), server.resident()))
            on_step("memory", len(replies), total)
    return samples, replies


def memory_summary(before: Resident, samples: Sequence[tuple[int, Resident]], replies: Sequence[Reply]) -> MemoryFigures:
    """Return growth and slope of resident memory.

    Raises:
        MachineError: a reply is not a complete answer.
    """
    for reply in replies:
        if not reply.answered:
            raise MachineError(f"a request got {described(reply)}, expected 200")
    counts = np.array([count for count, _ in samples], float)
    kept = {name: np.array([getattr(r, name) for _, r in samples]) for name in ("rss", "anonymous")}
    return MemoryFigures(
        requests=int(counts[-1] - counts[0]),
        warm_up=int(counts[0]),
        remembered=dict(sorted(Counter(reply.remembered for reply in replies).items())),
        before_mib=before.rss,
        samples=tuple(MemorySample(n, r.rss, r.anonymous) for n, r in samples),
        growth_mib=float(kept["rss"][-1] - kept["rss"][0]),
        slope_mib_per_1000={name: slope(counts, values) for name, values in kept.items()},
    )


def slope(counts: np.ndarray, values: np.ndarray) -> Slope:
    """Return the least-squares slope of values (n,) over counts (n,), float64, and its standard error, per 1,000; n ≥ 3."""
    centred = counts - counts.mean()
    steepness = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - steepness * centred
    error = (float(rest @ rest) / (len(counts) - 2) / float(centred @ centred)) ** 0.5
    return Slope(1000 * steepness, 1000 * error)
