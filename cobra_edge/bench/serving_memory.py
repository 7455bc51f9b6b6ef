"""Whether a server that runs for long keeps more and more memory."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MachineError
from .serving_client import Reply, ask, client
from .serving_load import described
from .serving_prefix_reuse import Step
from .serving_process import Resident, Server, served
from .serving_workload import Images, SimulatedClient

WARM_UP = 100
SAMPLE_EVERY = 100
_CACHE_MIB = 4
_KNOWN_IMAGES = 64  # more than the cache holds states of
_CLIENTS = 4
_MAX_TOKENS = 4


def measure_memory(bundle: Path, requests: int, on_step: Step) -> dict[str, Any]:
    """Read what a server keeps in memory after every hundredth request; its memory of images is small, so that it forgets.

    Args:
        bundle: what is served.
        requests: after those that warm it up; a multiple of SAMPLE_EVERY.
        on_step: told a stage's name, how much of it is done, and of what.

    Raises:
        MachineError: a request got no answer, or the server never forgot an image.
    """
    with served(bundle, "--state-cache-mib", str(_CACHE_MIB)) as server:
        before = server.resident()
        samples, replies = asyncio.run(_sampled(server, requests, on_step))
        evicted = server.counted("cobra_edge_state_cache_evicted_total")
    if not evicted:
        raise MachineError(f"a memory of {_CACHE_MIB} MiB forgot nothing in {len(replies)} requests; give more --requests")
    found = {"state_cache_mib": _CACHE_MIB, "known_images": _KNOWN_IMAGES, "evicted": evicted}
    return found | memory_summary(before, samples, replies)


async def _sampled(server: Server, requests: int, on_step: Step) -> tuple[list[tuple[int, Resident]], list[Reply]]:
    """Return what was resident after how many requests, and all replies."""
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


def memory_summary(before: Resident, samples: Sequence[tuple[int, Resident]], replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the growth from the first sample to the last, and the slope of the line through all of them.

    Raises:
        MachineError: a reply is no whole answer.
    """
    for reply in replies:
        if not reply.answered:
            raise MachineError(f"a request got {described(reply)}, expected 200")
    counts = np.array([count for count, _ in samples], float)
    kept = {name: np.array([getattr(r, name) for _, r in samples]) for name in ("rss", "anonymous")}
    return {
        "requests": int(counts[-1] - counts[0]),
        "warm_up": int(counts[0]),
        "remembered": dict(sorted(Counter(reply.remembered for reply in replies).items())),
        "before_mib": before.rss,
        "samples": [{"requests": n, "rss_mib": r.rss, "anonymous_mib": r.anonymous} for n, r in samples],
        "growth_mib": float(kept["rss"][-1] - kept["rss"][0]),
        "slope_mib_per_1000": {name: slope(counts, values) for name, values in kept.items()},
    }


def slope(counts: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return the least-squares slope of values over counts and its standard error, both for a thousand; needs three points."""
    centred = counts - counts.mean()
    steepness = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - steepness * centred
    error = (float(rest @ rest) / (len(counts) - 2) / float(centred @ centred)) ** 0.5
    return {"value": 1000 * steepness, "standard_error": 1000 * error}
