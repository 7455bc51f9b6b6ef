"""The result of `bench serve`, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from .machine import Machine
from .spread import Spread
from .tables import NO_VALUE, Table

# What is asked about, by field of the result.
IMAGES = {"prefix_reuse": "a small image (112 × 112)", "prefix_reuse_photo": "a photograph (1280 × 720, JPEG)"}


class Clock(msgspec.Struct, frozen=True):
    """Time to first token of both questions in milliseconds, and the speedup within a round, by one clock."""

    first_ms: Spread
    second_ms: Spread
    speedup: Spread


class ServedPrefixReuse(msgspec.Struct, frozen=True, kw_only=True):
    """First and second questions about new images.

    Attributes:
        rounds: images.
        images_checked: images that were also asked about with the prefix cache disabled.
        prompt_tokens: of each question.
        questions: their texts.
        client, server: times by the client's clock, and as reported by the server.
        http_ms: a request to /healthz, whose time is a part of both.
    """

    rounds: int
    images_checked: int
    prompt_tokens: int
    questions: tuple[str, str]
    client: Clock
    server: Clock
    http_ms: Spread


class Tail(msgspec.Struct, frozen=True):
    """Median and 95th percentile."""

    median: float
    p95: float

    def cell(self) -> str:
        """Return "median / p95"."""
        return f"{self.median:.0f} / {self.p95:.0f}"


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Replies under load.

    Attributes:
        seconds: wall time.
        statuses: number of replies by HTTP status.
        refused: number of 429.
        streamed: number of streamed answers that have text.
        remembered: number of answers by what the server took from its prefix cache.
        requests_per_s, tokens_per_s: throughput.
        ttft_ms: time to first token.
        latency_ms: time to the end of the answer.
    """

    seconds: float
    statuses: dict[str, int]
    refused: int
    streamed: int
    remembered: dict[str, int]
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Tail
    latency_ms: Tail


class LoadResult(LoadFigures, frozen=True, kw_only=True):
    """Replies under load, with the number of clients and the length of the server's queue."""

    clients: int
    waiting: int


class MemorySample(msgspec.Struct, frozen=True):
    """Resident memory after a number of requests."""

    requests: int
    rss_mib: float
    anonymous_mib: float


class Slope(msgspec.Struct, frozen=True):
    """Slope of a least-squares line and its standard error."""

    value: float
    standard_error: float


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Growth of resident memory over many requests.

    Attributes:
        requests: after the warm-up.
        warm_up: requests before the first sample.
        remembered: number of answers by what the server took from its prefix cache.
        before_mib: resident memory before the first request.
        samples: resident memory over time.
        growth_mib: from the first to the last sample.
        slope_mib_per_1000: MiB per 1,000 requests, by kind of memory ("rss", "anonymous").
    """

    requests: int
    warm_up: int
    remembered: dict[str, int]
    before_mib: float
    samples: tuple[MemorySample, ...]
    growth_mib: float
    slope_mib_per_1000: dict[str, Slope]


class MemoryResult(MemoryFigures, frozen=True, kw_only=True):
    """Growth of resident memory, with the size of the prefix cache, the number of known images, and of evicted entries."""

    state_cache_mib: int
    known_images: int
    evicted: float


class ShutdownResult(msgspec.Struct, frozen=True, kw_only=True):
    """Shutdown by SIGTERM under load.

    Attributes:
        clients: at the same time.
        rounds: servers that were shut down.
        seconds: from SIGTERM to the end of the process.
        exit_code: of the server.
        under_way: requests being answered when SIGTERM arrived.
        statuses: number of replies by HTTP status.
        cut: answers that were cut off.
    """

    clients: int
    rounds: int
    seconds: Spread
    exit_code: int
    under_way: int
    statuses: dict[str, int]
    cut: int


class ServeParts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parts that were measured."""

    prefix_reuse: ServedPrefixReuse | None = None
    prefix_reuse_photo: ServedPrefixReuse | None = None
    load: LoadResult | None = None
    memory: MemoryResult | None = None
    shutdown: ShutdownResult | None = None


class ServeResult(ServeParts, frozen=True, kw_only=True, omit_defaults=True):
    """`bench serve`; `server` are versions of its libraries."""

    bench: str = "serve"
    model: str
    weights: str
    scheme: str
    server: dict[str, str] = {}
    machine: Machine


def serving_table(results: Sequence[ServeResult]) -> Table:
    """Return the measurements as rows, with a column for each model."""
    m = results[0].machine
    title = (
        f"{m.processor}, {m.cores} cores, shared by server and clients. Rounds: median (low–high); clients: "
        f"median / 95th percentile. Commit {m.commit}."
    )
    columns = [dict(_measures(result)) for result in results]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, NO_VALUE) for column in columns)] for name in names]
    return Table(["", *map(_heading, results)], rows, title)


def served_images(result: ServeParts) -> Iterator[tuple[str, ServedPrefixReuse]]:
    """Yield the kinds of images that were measured, with their results."""
    for part, kind in IMAGES.items():
        found: ServedPrefixReuse | None = getattr(result, part)
        if found is not None:
            yield kind, found


def _measures(result: ServeResult) -> Iterator[tuple[str, str]]:
    for kind, reuse in served_images(result):
        yield f"time to first token, first question about {kind}, ms", reuse.client.first_ms.cell(".1f")
        yield f"time to first token, second question about {kind}, ms", reuse.client.second_ms.cell(".1f")
        yield f"speedup, {kind}", reuse.client.speedup.cell(".1f")
        yield f"speedup by the server's own clock, {kind}", reuse.server.speedup.cell(".1f")
    if result.prefix_reuse is not None:
        yield "HTTP overhead (/healthz), a part of each, ms", result.prefix_reuse.http_ms.cell(".1f")
    if load := result.load:
        what = f"{load.clients} clients, {load.seconds:.0f} s"
        yield f"{what}: answered requests per second", f"{load.requests_per_s:.1f}"
        yield f"{what}: tokens per second", f"{load.tokens_per_s:.0f}"
        yield f"{what}: time to first token, ms", load.ttft_ms.cell()
        yield f"{what}: latency, ms", load.latency_ms.cell()
        yield f"{what}: HTTP statuses, queue of {load.waiting}", _counts(load.statuses)
    if memory := result.memory:
        slope = memory.slope_mib_per_1000["rss"]
        yield "resident memory when ready, MiB", f"{memory.before_mib:.0f}"
        yield f"resident memory after {memory.warm_up} requests, MiB", f"{memory.samples[0].rss_mib:.1f}"
        yield f"growth in {memory.requests:,} more requests, MiB", f"{memory.growth_mib:+.1f}"
        yield "slope of the growth, MiB per 1,000 requests", f"{slope.value:+.2f} ± {slope.standard_error:.2f}"
    if shutdown := result.shutdown:
        what = f"SIGTERM under {shutdown.clients} clients"
        yield f"{what}: seconds to exit", shutdown.seconds.cell(".2f")
        yield f"{what}: HTTP statuses", _counts(shutdown.statuses)
        yield f"{what}: requests in flight / cut off", f"{shutdown.under_way} / {shutdown.cut}"


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} × {status}" for status, count in statuses.items())


def _heading(result: ServeResult) -> str:
    weights = ", random weights" if result.weights == "random" else ""
    return f"{result.model}{weights}, {result.scheme}"
