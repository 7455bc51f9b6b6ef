"""What a server counts and times, for Prometheus. Nothing in it tells what was asked or answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from .generation import REMEMBERED, Finished
from .prefix_cache import PrefixCache

# From a millisecond, the mini model's, to minutes, a large prompt on a small board.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class _CacheCounts(Collector):
    """The state cache's own counts, read when they are asked for."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = self.cache.counts
        hits = CounterMetricFamily("cobra_edge_state_cache_hits", "Beginnings that were remembered.", labels=["where"])
        hits.add_metric(["memory"], counts.hits_memory)
        hits.add_metric(["disk"], counts.hits_disk)
        yield hits
        for name, help_text, value in (
            ("misses", "Beginnings that were not remembered.", counts.misses),
            ("evicted", "States that made room for others.", counts.evicted),
            ("refused_files", "Files on disk that were damaged, and removed.", counts.refused_files),
        ):
            yield CounterMetricFamily(f"cobra_edge_state_cache_{name}", help_text, value=value)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The server's metrics, in a registry of their own."""

    registry: CollectorRegistry
    requests: Counter
    tokens: Counter
    remembered: Counter
    queue_seconds: Histogram
    ttft_seconds: Histogram
    tpot_seconds: Histogram

    @classmethod
    def of(cls, cache: PrefixCache, waiting: Callable[[], int], active: Callable[[], int]) -> Metrics:
        """Return the metrics of a server with that cache, which tells how many questions wait and are being answered."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_CacheCounts(cache))

        def gauge(name: str, help_text: str, read: Callable[[], float]) -> None:
            Gauge(f"cobra_edge_{name}", help_text, registry=registry).set_function(read)

        gauge("queue_depth", "Questions that wait for their turn.", waiting)
        gauge("active", "Questions that are being answered.", active)
        gauge("state_cache_bytes", "States kept in memory.", lambda: cache.size_bytes)
        gauge("state_cache_states", "States kept in memory, their number.", lambda: len(cache))

        def counter(name: str, help_text: str, label: str, values: tuple[str, ...] = ()) -> Counter:
            made = Counter(f"cobra_edge_{name}", help_text, [label], registry=registry)
            for value in values:  # so that they are there, and 0, before the first one
                made.labels(value)
            return made

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"cobra_edge_{name}_seconds", help_text, registry=registry, buckets=_SECONDS)

        return cls(
            registry,
            counter("requests", "Questions by how they ended, as HTTP's status; 499: the client went away.", "status"),
            counter("tokens", "Tokens by what became of them.", "kind", ("read", "remembered", "written")),
            counter("answers", "Answers by what did not have to be read again.", "remembered", REMEMBERED),
            histogram("queue", "From a question's arrival to its first turn."),
            histogram("ttft", "From a question's arrival to the answer's first token."),
            histogram("tpot", "Time of each further token, the mean of an answer."),
        )

    def ended(self, status: int) -> None:
        """Count a question by how it ended."""
        self.requests.labels(str(status)).inc()

    def answered(self, end: Finished) -> None:
        """Count an answer."""
        self.tokens.labels("read").inc(end.prompt_tokens - end.cached_tokens)
        self.tokens.labels("remembered").inc(end.cached_tokens)
        self.tokens.labels("written").inc(end.completion_tokens)
        self.remembered.labels(end.remembered).inc()
        self.queue_seconds.observe(end.queue_ms / 1e3)
        if end.ttft_ms is not None:
            self.ttft_seconds.observe(end.ttft_ms / 1e3)
        if end.tpot_ms is not None:
            self.tpot_seconds.observe(end.tpot_ms / 1e3)
