"""From outcomes to figures."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvfold.benchmark.load import Load
from kvfold.benchmark.options import Limits
from kvfold.benchmark.outcome import Outcome


@dataclass(frozen=True)
class Distribution:
    """Of `count` values, in their unit; percentiles interpolate linearly between the nearest values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class KVUsage:
    """What answers held in the KV cache, as `usage.kv` told: means over `count` requests, in bytes.

    compression: all dense bytes over all bytes held (None if none were held).
    """

    count: int
    method: str
    bytes: float
    dense_bytes: float
    compression: float | None


@dataclass(frozen=True)
class Summary:
    """One run. Times are seconds, throughputs per second of `duration`.

    ttft, e2e count from the scheduled time, *_from_send from when the request went out; tpot and itl do not depend
    on it. itl: times between chunks of text. lag: how late the generator sent. goodput: requests per second that
    met the limits (None: no limits were given). truncated: answers with other than the wanted number of tokens.
    counted: whether all tokens are the server's own counts. None stands for what no request measured.
    """

    requests: int
    completed: int
    failed: int
    not_sent: int
    interrupted: bool
    errors: dict[str, int]
    duration: float
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    peak_concurrency: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    ttft_from_send: Distribution | None
    e2e_from_send: Distribution | None
    lag: Distribution | None
    prompt_tokens: int
    expected_prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    truncated: int
    counted: bool
    kv: KVUsage | None
    client_cpu: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0 to 100) of ascending values, linear between neighbours."""
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """The distribution of the values that are there; None if there are none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, q) for q in (50, 90, 99))
    return Distribution(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def meets(outcome: Outcome, limits: Limits) -> bool:
    """Whether a request succeeded within the limits; a single token has no TPOT to miss."""
    late = limits.ttft is not None and (outcome.ttft is None or outcome.ttft > limits.ttft)
    slow = limits.tpot is not None and outcome.tpot is not None and outcome.tpot > limits.tpot
    return outcome.succeeded and not late and not slow


def peak_concurrency(outcomes: Iterable[Outcome]) -> int:
    """The most requests that were in flight at the same time."""
    steps = [(o.sent, 1) for o in outcomes if o.sent is not None and o.ended is not None]
    steps += [(o.ended, -1) for o in outcomes if o.sent is not None and o.ended is not None]
    running = peak = 0
    for _, step in sorted(steps):  # at one instant ends (-1) come before beginnings
        running += step
        peak = max(peak, running)
    return peak


def summarize(load: Load, limits: Limits) -> Summary:
    """Figures of a run. Latencies and tokens are of successful requests; the others are in `errors`, by kind."""
    done = [outcome for outcome in load.outcomes if outcome.succeeded]
    errors = Counter(outcome.error for outcome in load.outcomes if outcome.error is not None)
    prompt_tokens = sum(o.wanted_input if o.prompt_tokens is None else o.prompt_tokens for o in done)
    output_tokens = sum(o.output_tokens for o in done)
    cached = [o.cached_tokens for o in done if o.cached_tokens is not None]
    per_second = 1 / load.duration if load.duration > 0 else 0.0
    limited = limits.ttft is not None or limits.tpot is not None
    return Summary(
        requests=len(load.outcomes) + load.not_sent,
        completed=len(done),
        failed=len(load.outcomes) - len(done),
        not_sent=load.not_sent,
        interrupted=load.interrupted,
        errors=dict(errors.most_common()),
        duration=load.duration,
        request_throughput=len(done) * per_second,
        output_throughput=output_tokens * per_second,
        total_throughput=(prompt_tokens + output_tokens) * per_second,
        goodput=sum(meets(o, limits) for o in done) * per_second if limited else None,
        peak_concurrency=peak_concurrency(load.outcomes),
        ttft=distribution(o.ttft for o in done),
        tpot=distribution(o.tpot for o in done),
        itl=distribution(gap for o in done for gap in o.gaps),
        e2e=distribution(o.e2e for o in done),
        ttft_from_send=distribution(None if o.ttft is None else o.ttft - o.delay for o in done),
        e2e_from_send=distribution(None if o.e2e is None else o.e2e - o.delay for o in done),
        lag=distribution(o.lag for o in load.outcomes if o.sent is not None),
        prompt_tokens=prompt_tokens,
        expected_prompt_tokens=sum(o.wanted_input for o in done),
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        truncated=sum(o.output_tokens != o.wanted_output for o in done),
        counted=all(o.counted for o in done),
        kv=_kv_usage(done),
        client_cpu=load.cpu,
    )


def _kv_usage(outcomes: Sequence[Outcome]) -> KVUsage | None:
    told = [o.kv for o in outcomes if o.kv is not None]
    told = [kv for kv in told if all(_is_size(kv.get(name)) for name in ("bytes", "dense_bytes"))]
    if not told:
        return None
    held, dense = (math.fsum(kv[name] for kv in told) for name in ("bytes", "dense_bytes"))
    methods = sorted({str(kv.get("method")) for kv in told})
    return KVUsage(
        len(told), ", ".join(methods), held / len(told), dense / len(told), dense / held if held > 0 else None
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf
