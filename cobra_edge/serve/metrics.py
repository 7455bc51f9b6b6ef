"""Prometheus metrics. None depends on the content of a prompt or an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from .generation import REMEMBERED, Finished
from .prefix_cache import PrefixCache

# From a millisecond (the mini model) to minutes (a long prompt on a small board).
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class _CacheCounts(Collector):
    """Counts of the prefix cache, read at each scrape."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache

    def collect(self) -> Iterator[CounterMetricFamily]:
        counts = self.cache.counts
        hits = CounterMetricFamily("cobra_edge_state_cache_hits", "Prompts with a cached prefix.", labels=["where"])
        hits.add_metric(["memory"], counts.hits_memory)
        hits.add_metric(["disk"], counts.hits_disk)
        yield hits
        for name, help_text, value in (
            ("misses", "Prompts without a cached prefix.", counts.misses),
            ("evicted", "States evicted from memory.", counts.evicted),
            ("refused_files", "Damaged files on disk, removed.", counts.refused_files),
        ):
            yield CounterMetricFamily(f"cobra_edge_state_cache_{name}", help_text, value=value)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The server's metrics, in their own registry."""

    registry: CollectorRegistry
    requests: Counter
    tokens: Counter
    remembered: Counter
    queue_seconds: Histogram
    ttft_seconds: Histogram
    tpot_seconds: Histogram

    @classmethod
    def of(cls, cache: PrefixCache, waiting: Callable[[], int], active: Callable[[], int]) -> Metrics:
        """Return the metrics of a server.

        Args:
            cache: its prefix cache.
            waiting, active: numbers of queued and running requests.
        """
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_CacheCounts(cache))

        def gauge(name: str, help_text: str, read: Callable[[], float]) -> None:
            Gauge(f"cobra_edge_{name}", help_text, registry=registry).set_function(read)

        gauge("queue_depth", "Queued requests.", waiting)
        gauge("active", "Running requests.", active)
        gauge("state_cache_bytes", "Size of the states in memory.", lambda: cache.size_bytes)
        gauge("state_cache_states", "Number of states in memory.", lambda: len(cache))

        def counter(name: str, help_text: str, label: str, values: tuple[str, ...] = ()) -> Counter:
            made = Counter(f"cobra_edge_{name}", help_text, [label], registry=registry)
            for value in values:  # so that each is exported as 0 before its first event
                made.labels(value)
            return made

        def histogram(name: str, help_text: str) -> Histogram:
            return Histogram(f"cobra_edge_{name}_seconds", help_text, registry=registry, buckets=_SECONDS)

        return cls(
            registry,
            counter("requests", "Requests by final HTTP status; 499: the client disconnected.", "status"),
            counter(
                "tokens",
                "Tokens by kind: prompt tokens read or remembered, generated tokens written.",
                "kind",
                ("read", "remembered", "written"),
            ),
            counter("answers", "Answers by cached prefix: nothing, image or conversation.", "remembered", REMEMBERED),
            histogram("queue", "From a request's arrival to its first time slice."),
            histogram("ttft", "From a request's arrival to the first token."),
            histogram("tpot", "Time per output token after the first, mean over an answer."),
        )

    def ended(self, status: int) -> None:
        """Count a request by its final status."""
        self.requests.labels(str(status)).inc()

    def answered(self, end: Finished) -> None:
        """Count a complete answer."""
        self.tokens.labels("read").inc(end.prompt_tokens - end.cached_tokens)
        self.tokens.labels("remembered").inc(end.cached_tokens)
        self.tokens.labels("written").inc(end.completion_tokens)
        self.remembered.labels(end.remembered).inc()
        self.queue_seconds.observe(end.queue_ms / 1e3)
        if end.ttft_ms is not None:
            self.ttft_seconds.observe(end.ttft_ms / 1e3)
        if end.tpot_ms is not None:
            self.tpot_seconds.observe(end.tpot_ms / 1e3)
