"""Prometheus metrics in vLLM's style, with the prefix `kvfold:`."""

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvfold.engine.stats import WorkerStats
from kvfold.server.engine_client import EngineClient

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
RECENT = 60.0  # seconds that "of late" means


class Metrics:
    """What the server measures itself, and what the engine last said."""

    def __init__(self, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvfold:{name}", text, ["kv"], registry=self.registry, buckets=buckets)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self._tpot = histogram("time_per_output_token_seconds", "Mean time between a request's tokens.", _PER_TOKEN)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Prompt lengths.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Output lengths.", _TOKENS)
        self._ended = Counter(
            "kvfold:request_success",
            "Requests that ended by themselves.",
            ["kv", "finished_reason"],
            registry=self.registry,
        )
        self._failed = Counter(
            "kvfold:request_failure", "Requests that did not.", ["kv", "reason"], registry=self.registry
        )
        self._recent: deque[tuple[float, float, int]] = deque()  # when, TTFT, prompt tokens

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def request(self, kv: str, prompt_tokens: int) -> "RequestTimer":
        """Starts the clocks of a request."""
        return RequestTimer(self, kv, prompt_tokens)

    def recent_ttft(self) -> list[float]:
        """Seconds, of the requests that had their first token in the last minute."""
        self._forget()
        return [ttft for _, ttft, _ in self._recent]

    def prompt_rate(self) -> float:
        """Prompt tokens per second of the last minute's requests; 0 where there were none."""
        self._forget()
        if not self._recent:
            return 0.0
        return sum(tokens for *_, tokens in self._recent) / max(
            1.0, time.monotonic() - self._recent[0][0] + self._recent[0][1]
        )

    def percentile(self, percent: float) -> float | None:
        """Of the recent TTFTs, in seconds."""
        values = self.recent_ttft()
        return float(np.percentile(values, percent)) if values else None

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - RECENT:
            self._recent.popleft()


class RequestTimer:
    """One request's clocks; `end` or `fail` once."""

    def __init__(self, metrics: Metrics, kv: str, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._kv = kv
        self._prompt_tokens = prompt_tokens
        self._arrival = time.monotonic()
        self._first: float | None = None
        self._tokens = 0

    def tokens(self, count: int) -> None:
        """`count` tokens have come."""
        if count and self._first is None:
            self._first = time.monotonic()
            ttft = self._first - self._arrival
            self._metrics._ttft.labels(self._kv).observe(ttft)
            self._metrics._recent.append((self._first, ttft, self._prompt_tokens))
        self._tokens += count

    def end(self, reasons: list[str]) -> None:
        """The request ended; reasons: of its completions."""
        now, metrics = time.monotonic(), self._metrics
        metrics._e2e.labels(self._kv).observe(now - self._arrival)
        metrics._prompt.labels(self._kv).observe(self._prompt_tokens)
        metrics._generated.labels(self._kv).observe(self._tokens)
        per_completion = self._tokens / len(reasons)
        if self._first is not None and per_completion > 1:
            metrics._tpot.labels(self._kv).observe((now - self._first) / (per_completion - 1))
        for reason in reasons:
            metrics._ended.labels(self._kv, reason).inc()

    def fail(self, reason: str) -> None:
        """The request was cancelled, timed out or failed."""
        self._metrics._failed.labels(self._kv, reason).inc()


class _EngineCollector(Collector):
    """The engine's last report, read when someone asks. Counters begin anew when the engine does."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        gauges = {
            "num_requests_running": ("Sequences that hold KV pages.", stats.running),
            "num_requests_waiting": ("Sequences that wait for KV memory or a place in the batch.", stats.waiting),
            "kv_bytes_used": ("Bytes of KV pages in use.", stats.used * stats.page_bytes),
            "kv_bytes_cached": ("Of those, bytes that only prefix snapshots hold.", stats.cached * stats.page_bytes),
            "kv_bytes_free": ("Bytes of free KV pages.", (stats.pages - stats.used) * stats.page_bytes),
            "kv_cache_usage_perc": ("Share of KV pages in use, 0 to 1.", stats.used / max(1, stats.pages)),
            "engine_up": ("Whether the engine process is ready.", float(self._client.status == "ready")),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"kvfold:{name}", text, value)
        per_method = {
            "kv_method_bytes": ("KV bytes of running sequences.", "bytes"),
            "kv_compression": ("Dense bytes over bytes held, of running sequences.", "compression"),
        }
        for name, (text, attribute) in per_method.items():
            family = GaugeMetricFamily(f"kvfold:{name}", text, labels=["kv"])
            for lane in stats.lanes:
                family.add_metric([lane.kv], getattr(lane, attribute))
            yield family
        yield from _of_workers(stats.workers)
        totals = {
            "prompt_tokens": ("Prompt tokens computed.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "prefix_cache_queries": ("Prompt tokens looked up among prefix snapshots.", stats.prefix_queried_tokens),
            "prefix_cache_hits": ("Prompt tokens found there.", stats.prefix_hit_tokens),
            "num_preemptions": ("Running sequences sent back to wait for memory.", stats.preemptions),
            "evicted_tokens": ("Tokens of prefix snapshots dropped to make room.", stats.evicted_tokens),
            "dropped_tokens": ("Tokens that KV methods dropped, averaged over heads.", stats.dropped_tokens),
            "engine_restarts": ("Engine processes started after one died.", self._client.restarts),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(f"kvfold:{name}", text, value)


def _of_workers(workers: list[WorkerStats]) -> Iterator[Metric]:
    """A cluster's own metrics, nothing for a single engine."""
    gauges = {
        "worker_up": ("Whether a worker is ready.", "up"),
        "worker_requests": ("Requests that a worker works on.", "requests"),
        "worker_kv_bytes_used": ("Bytes of KV pages in use.", "used_bytes"),
        "worker_kv_bytes": ("Bytes of KV pages.", "kv_bytes"),
        "worker_handovers_offered": ("Caches that were computed and wait to be fetched.", "offered"),
        "worker_handovers_offered_bytes": ("Bytes of pages that such caches hold.", "offered_bytes"),
        "worker_handovers_waiting": ("Caches that wait for KV memory here.", "expected"),
        "worker_handovers_arriving": ("Caches on their way here.", "arriving"),
    }
    counters = {
        "worker_handovers": ("Caches that have arrived.", "fetched"),
        "worker_handover_bytes": ("Bytes of them on the wire.", "fetched_bytes"),
        "worker_handover_seconds": ("Time that took.", "fetched_seconds"),
        "worker_handovers_lost": ("Caches that did not arrive; their prompts are read again.", "lost"),
        "worker_restarts": ("Times that a worker was started again.", "restarts"),
    }
    if not workers:
        return
    for kind, named in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
        for name, (text, attribute) in named.items():
            family = kind(f"kvfold:{name}", text, labels=["worker", "role"])
            for worker in workers:
                family.add_metric([worker.name, worker.role], float(getattr(worker, attribute)))
            yield family
