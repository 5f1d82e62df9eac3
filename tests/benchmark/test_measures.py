"""Figures against numpy and against plain counting."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.benchmark.load import Load
from kvfold.benchmark.measures import distribution, meets, peak_concurrency, percentile, summarize
from kvfold.benchmark.options import Limits
from kvfold.benchmark.outcome import Outcome

SECONDS = st.floats(0, 1000, allow_nan=False)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    expected = np.percentile(values, q)
    assert percentile(sorted(values), q) == pytest.approx(expected, rel=1e-9, abs=1e-5)


@given(st.lists(st.none() | SECONDS, max_size=50))
def test_distributions_are_of_the_values_that_are_there(values: list[float | None]) -> None:
    there = [value for value in values if value is not None]
    found = distribution(values)
    if not there:
        assert found is None
        return
    assert found is not None
    assert found.count == len(there)
    figures = [found.mean, found.p50, found.p90, found.p99, found.max]
    expected = [np.mean(there), *np.percentile(there, [50, 90, 99]), max(there)]
    assert figures == pytest.approx([float(figure) for figure in expected])


@st.composite
def outcomes(draw: st.DrawFn) -> Outcome:
    """A request with consistent times that may have failed."""
    scheduled = draw(SECONDS)
    sent = scheduled + draw(SECONDS)
    arrivals = list(np.cumsum([sent, *draw(st.lists(SECONDS, min_size=1, max_size=6))]))[1:]
    return Outcome(
        index=0,
        wanted_input=10,
        wanted_output=draw(st.integers(1, 6)),
        scheduled=scheduled,
        ready=sent,
        sent=sent,
        ended=arrivals[-1],
        arrivals=arrivals,
        prompt_tokens=draw(st.none() | st.integers(1, 100)),
        output_tokens=draw(st.integers(1, 20)),
        counted=True,
        error=draw(st.sampled_from([None, None, None, "429", "timeout"])),
        kv=draw(st.none() | st.fixed_dictionaries({"bytes": st.integers(1, 99), "dense_bytes": st.integers(1, 99)})),
    )


@given(st.lists(outcomes(), max_size=30), st.none() | SECONDS, st.none() | SECONDS, st.integers(0, 5))
def test_a_summary_is_what_counting_gives(
    found: list[Outcome], ttft: float | None, tpot: float | None, not_sent: int
) -> None:
    limits = Limits(ttft or None, tpot or None)
    duration = max((o.ended or 0 for o in found), default=0) + 1
    summary = summarize(Load(found, not_sent, duration, 0.1, False), limits)
    done = [o for o in found if o.error is None]
    assert summary.requests == len(found) + not_sent == summary.completed + summary.failed + summary.not_sent
    assert summary.completed == len(done)
    assert sum(summary.errors.values()) == summary.failed == len(found) - len(done)
    assert summary.output_tokens == sum(o.output_tokens for o in done)
    assert summary.output_throughput * duration == pytest.approx(summary.output_tokens)
    assert summary.total_throughput * duration == pytest.approx(
        sum(o.output_tokens + (10 if o.prompt_tokens is None else o.prompt_tokens) for o in done)
    )
    first = np.array([o.arrivals[0] - o.scheduled for o in done])
    rest = np.array([(o.arrivals[-1] - o.arrivals[0]) / max(1, o.output_tokens - 1) for o in done])
    rest[[o.output_tokens == 1 for o in done]] = 0
    good = (first <= (limits.ttft or np.inf)) & (rest <= (limits.tpot or np.inf))
    if limits == Limits():
        assert summary.goodput is None
    else:
        assert summary.goodput is not None
        assert summary.goodput * duration == pytest.approx(good.sum())
    if done:
        assert summary.ttft is not None
        assert summary.ttft_from_send is not None
        assert summary.ttft.p50 == pytest.approx(np.median(first))
        sent = [o.arrivals[0] - (o.sent or 0) for o in done]
        assert summary.ttft_from_send.mean == pytest.approx(np.mean(sent), abs=1e-6)
    told = [o.kv for o in done if o.kv]
    assert (summary.kv is None) == (not told)
    if summary.kv is not None:
        held, dense = sum(kv["bytes"] for kv in told), sum(kv["dense_bytes"] for kv in told)
        assert (summary.kv.bytes, summary.kv.compression) == pytest.approx((held / len(told), dense / held))


@given(st.lists(outcomes(), max_size=20))
def test_peak_concurrency_is_reached_where_a_request_begins(found: list[Outcome]) -> None:
    def in_flight(moment: float) -> int:
        return sum((o.sent or 0) <= moment < (o.ended or 0) for o in found)

    assert peak_concurrency(found) == max((in_flight(o.sent or 0) for o in found), default=0)


def outcome(**fields: Any) -> Outcome:
    return Outcome(**{"index": 0, "wanted_input": 1, "wanted_output": 1, "scheduled": 1.0, "sent": 1.5, **fields})


def test_one_token_has_no_tpot_and_misses_no_limit() -> None:
    one = outcome(ended=3.0, arrivals=[3.0], output_tokens=1)
    assert one.tpot is None
    assert one.ttft == 2
    assert meets(one, Limits(ttft=2.0, tpot=0.001))
    assert not meets(one, Limits(ttft=1.9))


def test_an_answer_without_text_has_its_first_token_at_its_end() -> None:
    assert outcome(ended=3.0, output_tokens=1).ttft == 2
    assert outcome(ended=3.0, error="timeout").ttft is None


def test_waiting_for_a_place_is_not_the_generators_lag() -> None:
    late = outcome(ready=1.4, ended=2.0)
    assert late.lag == pytest.approx(0.1)
    assert late.delay == pytest.approx(0.5)


def test_nothing_measured_is_not_zero() -> None:
    summary = summarize(Load([outcome(ended=2.0, error="429")], 0, 1.0, 0.0, False), Limits(ttft=1.0))
    assert summary.ttft is None
    assert summary.goodput == 0
    assert summary.kv is None
    assert summary.cached_tokens is None
