"""The simulator against what queueing theory knows: a worker that serves one prompt at a time is an M/D/1 queue."""

import math
import random
from statistics import fmean

import pytest

from kvfold.benchmark.arrivals import arrival_times
from kvfold.planner.document import EngineLimits
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost
from kvfold.planner.placement import Link, Placement
from kvfold.planner.simulator import simulate

from .build import method_profile, requests

SERVICE = 0.1
PROMPT = 64
FIXED = LatencyModel(PrefillCost(SERVICE, 0.0, 0.0), DecodeCost(0.01, 0.0, 0.0))
ONE_AT_A_TIME = EngineLimits(chunk=PROMPT, max_batch_tokens=PROMPT, max_sequences=8)


def stratified_times(count: int, rate: float, seed: int) -> list[float]:
    """Poisson arrivals whose gaps are exponential quantiles in random order: their mean and spread are exact, and what
    is left of chance is the order alone."""
    gaps = [-math.log(1 - (i + 0.5) / count) / rate for i in range(count)]
    random.Random(seed).shuffle(gaps)
    times = [0.0]
    for gap in gaps[1:]:
        times.append(times[-1] + gap)
    return times


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_mean_wait_of_an_m_d_1_queue(load: float) -> None:
    """Mean wait rho s / (2 (1 - rho)), Pollaczek and Khinchine, within 1 %."""
    waits = []
    for seed in range(3):
        times = stratified_times(25_000, load / SERVICE, seed)
        sizes = requests(*((at, PROMPT, 1) for at in times))
        result = simulate(sizes, Placement(mixed=1), method_profile(latency=FIXED), ONE_AT_A_TIME, 2**24)
        waits += [record.ttft - SERVICE for record in result.records if record.ttft is not None]
    assert fmean(waits) == pytest.approx(load * SERVICE / (2 * (1 - load)), rel=0.01)


def test_a_deterministic_queue_has_no_wait_below_capacity() -> None:
    sizes = requests(*((i * SERVICE * 1.01, PROMPT, 1) for i in range(50)))
    result = simulate(sizes, Placement(mixed=1), method_profile(latency=FIXED), ONE_AT_A_TIME, 2**24)
    assert [r.ttft for r in result.records] == pytest.approx([SERVICE] * 50)
    assert all(r.tpot is None for r in result.records)


def test_prefill_workers_queue_like_the_co_located_one() -> None:
    """What comes after the first token is another worker's."""
    times = arrival_times(300, 5, 1.0, random.Random(1))
    one = simulate(
        requests(*((at, PROMPT, 1) for at in times)),
        Placement(mixed=1),
        method_profile(latency=FIXED),
        ONE_AT_A_TIME,
        2**26,
    )
    apart = simulate(
        requests(*((at, PROMPT, 20) for at in times)),
        Placement(prefill=1, decode=1),
        method_profile(latency=FIXED),
        ONE_AT_A_TIME,
        2**26,
        Link(gbps=1e9),
    )
    assert [r.ttft for r in apart.records] == pytest.approx([r.ttft for r in one.records])


def test_latencies_of_one_request_are_the_sum_of_its_steps() -> None:
    limits = EngineLimits(chunk=100, max_batch_tokens=100, prefix_caching=False)
    latency = LatencyModel(PrefillCost(0.5, 0.01, 1e-6), DecodeCost(0.2, 0.0, 0.05))
    method = method_profile(latency=latency)
    record = simulate(requests((3.0, 250, 11)), Placement(mixed=1), method, limits, 2**24).records[0]
    assert record.ttft == pytest.approx(3 * 0.5 + 2.5 + 250**2 * 1e-6)
    assert record.tpot == pytest.approx(0.25)
    link = Link(gbps=0.008, overhead=0.125)  # a megabyte per second
    apart = simulate(requests((3.0, 250, 11)), Placement(prefill=1, decode=1), method, limits, 2**24, link).records[0]
    assert apart.ttft == pytest.approx(record.ttft)
    handover = 0.125 + apart.wire_bytes / 2 / 1e6  # the first of two layers left while the second was computed
    assert apart.pulled is not None
    assert apart.handed is not None
    assert apart.pulled - apart.handed == pytest.approx(handover)
    assert apart.tpot == pytest.approx((handover + 10 * 0.25) / 10)
    late = Link(gbps=0.008, overhead=0.125, first_token="pull")
    pulled = simulate(requests((3.0, 250, 11)), Placement(prefill=1, decode=1), method, limits, 2**24, late).records[0]
    assert (pulled.ttft, pulled.tpot) == (pytest.approx(record.ttft + handover), pytest.approx(0.25))
