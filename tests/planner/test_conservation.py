"""What holds for every simulation: nobody is lost, no page leaks, memory is never exceeded, time runs forwards."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.benchmark.trace import TraceRequest
from kvfold.planner.document import EngineLimits
from kvfold.planner.errors import PlacementError
from kvfold.planner.placement import Link, Placement
from kvfold.planner.records import Limits
from kvfold.planner.scheduler import SimSequence
from kvfold.planner.simulator import simulate

from .build import layout_of, method_profile

METHODS = ["none", "kivi(bits=2)"]
placements = st.one_of(
    st.builds(Placement, mixed=st.integers(1, 3)),
    st.builds(Placement, prefill=st.integers(1, 3), decode=st.integers(1, 3)),
)
requests = st.lists(
    st.builds(TraceRequest, st.floats(0, 5), st.integers(1, 300), st.integers(1, 150)), min_size=1, max_size=12
)
links = st.builds(Link, st.sampled_from([0.001, 0.1, 10.0]), st.sampled_from([0.0, 0.05]))
limits = st.builds(EngineLimits, st.integers(16, 200), st.integers(16, 300), st.integers(1, 6), st.booleans())


@given(requests, placements, st.sampled_from(METHODS), limits, links, st.integers(100, 300))
def test_conservation(
    asked: list[TraceRequest], placement: Placement, method: str, engine: EngineLimits, link: Link, percent: int
) -> None:
    layout = layout_of(method)
    pages = max(layout.most_pages(r.input_tokens + r.output_tokens, engine.chunk) for r in asked) * percent // 100
    memory = pages * layout.page_bytes
    tokens = dict.fromkeys(range(len(asked)), 0)
    clock: dict[int, float] = {}

    def step(worker: int, now: float, scheduled: list[tuple[SimSequence, int]]) -> None:
        assert now >= clock.get(worker, 0.0)
        clock[worker] = now
        assert sum(count for _, count in scheduled) <= engine.max_batch_tokens
        assert len({s.index for s, _ in scheduled}) == len(scheduled)
        for sequence, count in scheduled:
            assert 1 <= count <= engine.chunk
            assert sequence.at <= now + 1e-9
            tokens[sequence.index] += count

    # The simulation itself refuses to end with a page in use.
    result = simulate(asked, placement, method_profile(method), engine, memory, link, on_step=step)
    assert result.complete
    assert len(result.peak_pages) == placement.workers
    assert max(result.peak_pages) <= pages
    assert [r.index for r in result.records] == list(range(len(asked)))
    for record, request in zip(result.records, asked, strict=True):
        assert record.output_tokens == request.output_tokens
        assert record.first is not None
        assert record.last is not None
        assert record.at < record.first <= record.last
        computed = request.input_tokens + request.output_tokens - 1
        assert tokens[record.index] == computed if not record.preemptions else tokens[record.index] >= computed
        if placement.prefill and request.output_tokens > 1:
            assert record.handed is not None
            assert record.pulled is not None
            assert record.first == record.handed < record.pulled < record.last
            assert record.wire_bytes > 0


@given(requests, st.integers(1, 3))
@settings(max_examples=15)
def test_one_at_a_time_nobody_waits(asked: list[TraceRequest], workers: int) -> None:
    """Far apart requests have the same latencies on one worker as on several, and none lower than alone."""
    spaced = [TraceRequest(1000.0 * i, r.input_tokens, r.output_tokens) for i, r in enumerate(asked)]
    one, several = (simulate(spaced, Placement(mixed=n), method_profile(), EngineLimits(), 2**26) for n in (1, workers))
    assert [r.ttft for r in one.records] == pytest.approx([r.ttft for r in several.records], rel=1e-6)
    crowded = simulate(asked, Placement(mixed=workers), method_profile(), EngineLimits(), 2**26)
    for lone, other in zip(one.records, crowded.records, strict=True):
        assert lone.ttft is not None
        assert other.ttft is not None
        assert other.ttft >= lone.ttft - 1e-6


@given(st.lists(st.integers(1, 400), min_size=2, max_size=8))
def test_first_tokens_come_in_order_of_arrival(prompts: list[int]) -> None:
    engine = EngineLimits(chunk=64, max_batch_tokens=64, prefix_caching=False)
    asked = [TraceRequest(0.001 * i, prompt, 1) for i, prompt in enumerate(prompts)]
    records = simulate(asked, Placement(mixed=1), method_profile(), engine, 2**26).records
    firsts = [r.first or 0.0 for r in records]
    assert firsts == sorted(firsts)


def test_the_decode_side_holds_the_prefill_side_up() -> None:
    """A decode worker with memory for one sequence: the others' pages wait where they are, prompts wait for them."""
    layout = layout_of("none")
    memory = layout.most_pages(400, 512) * layout.page_bytes * 3 // 2
    asked = [TraceRequest(0.0, 300, 100)] * 4
    placement = Placement(prefill=1, decode=1)
    tight = simulate(asked, placement, method_profile(), EngineLimits(), memory)
    roomy = simulate(asked, placement, method_profile(), EngineLimits(), 20 * memory)
    assert max(r.ttft or 0 for r in tight.records) > 2 * max(r.ttft or 0 for r in roomy.records)
    assert tight.preemptions == 0
    assert sorted(r.pulled or 0 for r in tight.records) == [r.pulled for r in tight.records]


def test_a_link_is_shared_and_a_slower_one_delays() -> None:
    asked = [TraceRequest(0.0, 200, 20)] * 6
    times = [
        max(r.pulled or 0 for r in simulate(asked, p, method_profile(), EngineLimits(), 2**26, Link(gbps)).records)
        for p, gbps in (
            (Placement(prefill=1, decode=1), 1.0),
            (Placement(prefill=1, decode=1), 0.01),
            (Placement(prefill=1, decode=3), 0.01),
        )
    ]
    assert times[0] < times[1]
    assert times[2] == pytest.approx(times[1])  # all of it leaves one worker


def test_fewer_bytes_arrive_sooner() -> None:
    asked = [TraceRequest(0.0, 2000, 20)] * 3
    link = Link(0.01)
    dense, packed = (
        simulate(asked, Placement(prefill=1, decode=1), method_profile(m), EngineLimits(), 2**28, link) for m in METHODS
    )
    sent = [sum(r.wire_bytes for r in result.records) for result in (dense, packed)]
    assert sent[1] < sent[0] / 2
    assert max(r.pulled or 0 for r in packed.records) < max(r.pulled or 0 for r in dense.records)


def test_requests_go_where_fewest_bytes_are() -> None:
    asked = [TraceRequest(0.0, n, 50) for n in (2000, 100, 100, 100)]
    records = simulate(asked, Placement(mixed=2), method_profile(), EngineLimits(), 2**28).records
    assert [r.prefill_worker for r in records] == [0, 1, 1, 1]


def test_a_hopeless_run_ends_early() -> None:
    asked = [TraceRequest(0.0, 500, 100)] * 40
    args = asked, Placement(mixed=1), method_profile(), EngineLimits(), 2**28
    result = simulate(*args, stop_at=(Limits(1e-6, 1.0), 3))
    assert not result.complete
    assert result.steps < simulate(*args).steps / 10


def test_a_prompt_that_no_worker_holds() -> None:
    with pytest.raises(PlacementError, match=r"a prompt of 5000 tokens needs .* raise --kv-memory"):
        simulate([TraceRequest(0.0, 5000, 1)], Placement(mixed=1), method_profile(), EngineLimits(), 2**18)


def test_an_output_that_memory_cannot_hold_is_cut_as_the_engine_cuts_it() -> None:
    layout = layout_of("none")
    memory = layout.most_pages(256, 512) * layout.page_bytes
    record = simulate([TraceRequest(0.0, 200, 500)], Placement(mixed=1), method_profile(), EngineLimits(), memory)
    assert record.records[0].output_tokens == 256 - 200
