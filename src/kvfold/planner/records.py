"""What a simulation says of each request, and measures of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.benchmark.measures import Distribution, distribution

FORGIVEN = 1e-6
"""Share by which a limit may be exceeded: times are differences of long sums."""


@dataclass(frozen=True)
class Limits:
    """Most seconds to the first token and per further token."""

    ttft: float
    tpot: float


@dataclass(frozen=True)
class RequestRecord:
    """One request. Times are seconds since the first arrival; None: not reached before the simulation was ended.

    output_tokens: fewer than the trace's where memory or the model's positions ended it. handed, pulled: when the
    prompt had been read and when all of its pages had been pulled (disaggregated placements); wire_bytes: what
    crossed. cached_tokens: of the prompt, found in a prefix cache.
    """

    index: int
    at: float
    input_tokens: int
    output_tokens: int
    first: float | None
    last: float | None
    prefill_worker: int = 0
    decode_worker: int = 0
    handed: float | None = None
    pulled: float | None = None
    wire_bytes: int = 0
    preemptions: int = 0
    cached_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.at

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token, which has none to be late."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    def in_time(self, limits: Limits) -> bool:
        return self.ttft is not None and self.ttft <= limits.ttft * (1 + FORGIVEN)

    def fluent(self, limits: Limits) -> bool:
        return self.last is not None and (self.tpot is None or self.tpot <= limits.tpot * (1 + FORGIVEN))

    def meets(self, limits: Limits) -> bool:
        """Both limits at once, as a user feels them."""
        return self.in_time(limits) and self.fluent(limits)


@dataclass(frozen=True)
class SimulationResult:
    """peak_pages: of each worker, prefill workers first; page_bytes: of a page. complete: every request was served,
    which is not so where a search ended a hopeless run early. duration: seconds to the last token."""

    records: tuple[RequestRecord, ...]
    peak_pages: tuple[int, ...]
    page_bytes: int
    steps: int
    preemptions: int
    duration: float
    complete: bool

    @property
    def rate(self) -> float:
        """Requests per second that arrived."""
        return arrival_rate([record.at for record in self.records])

    def attainment(self, limits: Limits) -> float:
        """Share of requests that meet both limits."""
        return sum(record.meets(limits) for record in self.records) / len(self.records)


@dataclass(frozen=True)
class Summary:
    """Measures of a simulation; attainments are None without limits. cached_share: of all prompt tokens."""

    requests: int
    rate: float
    attainment: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    ttft: Distribution | None
    tpot: Distribution | None
    duration: float
    output_throughput: float
    peak_pages: tuple[int, ...]
    peak_bytes: int
    transfers: int
    transfer_bytes: int
    transfer_seconds: Distribution | None
    preemptions: int
    steps: int
    cached_share: float


def summarize(result: SimulationResult, limits: Limits | None) -> Summary:
    """transfer_seconds: from the end of the prompt to the end of the pull, waiting for memory included."""
    records = result.records
    moved = [r for r in records if r.handed is not None and r.pulled is not None]
    return Summary(
        len(records),
        result.rate,
        None if limits is None else result.attainment(limits),
        None if limits is None else sum(r.in_time(limits) for r in records) / len(records),
        None if limits is None else sum(r.fluent(limits) for r in records) / len(records),
        distribution(r.ttft for r in records),
        distribution(r.tpot for r in records),
        result.duration,
        sum(r.output_tokens for r in records) / result.duration if result.duration else 0.0,
        result.peak_pages,
        max(result.peak_pages) * result.page_bytes,
        len(moved),
        sum(r.wire_bytes for r in moved),
        distribution((r.pulled or 0) - (r.handed or 0) for r in moved),
        result.preemptions,
        result.steps,
        sum(r.cached_tokens for r in records) / sum(r.input_tokens for r in records),
    )


def arrival_rate(times: Sequence[float]) -> float:
    """Requests per second over the time in which they came; infinite where all came at once."""
    span = max(times) - min(times)
    return (len(times) - 1) / span if span > 0 else float("inf")
