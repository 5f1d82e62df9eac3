"""The order of things: places, schedules and stopping, without a network."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.benchmark.load import Load, Send, offer_load
from kvfold.benchmark.outcome import Outcome
from kvfold.benchmark.workload import PlannedRequest

Clock = Callable[[], float]


def plan(count: int, gap: float = 0.0) -> list[PlannedRequest]:
    return [PlannedRequest(i, i * gap, "p", 1, 1) for i in range(count)]


async def offer(
    requests: list[PlannedRequest],
    send: Send,
    concurrency: int | None = None,
    closed_loop: bool = False,
    stop: asyncio.Event | None = None,
) -> tuple[Load, int]:
    done = 0

    def advance(n: int = 1) -> None:
        nonlocal done
        done += n

    load = await offer_load(
        requests, send, concurrency=concurrency, closed_loop=closed_loop, stop=stop or asyncio.Event(), advance=advance
    )
    return load, done


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.none() | st.integers(1, 5), st.booleans())
@settings(max_examples=40)
def test_every_request_is_sent_once_and_never_too_many(steps: list[int], limit: int | None, closed: bool) -> None:
    running = peak = 0

    async def send(request: PlannedRequest, outcome: Outcome, clock: Clock) -> None:
        nonlocal running, peak
        outcome.sent = clock()
        running += 1
        peak = max(peak, running)
        for _ in range(steps[request.index]):
            await asyncio.sleep(0)
        running -= 1
        outcome.ended = clock()

    load, done = asyncio.run(offer(plan(len(steps)), send, limit, closed))
    assert [o.index for o in load.outcomes] == list(range(len(steps)))
    assert done == len(steps)
    assert load.not_sent == 0
    assert not load.interrupted
    assert peak <= (limit or len(steps))
    if min(steps) > 2 * len(steps):
        assert peak == min(limit or len(steps), len(steps))
    for outcome in load.outcomes:
        assert outcome.sent is not None
        assert outcome.scheduled <= outcome.sent <= load.duration
        if not closed:
            assert outcome.scheduled == 0  # latency counts from here, however long the wait for a place was


def test_a_closed_loop_schedules_when_a_place_is_free() -> None:
    ends: list[float] = []

    async def send(request: PlannedRequest, outcome: Outcome, clock: Clock) -> None:
        outcome.sent = clock()
        await asyncio.sleep(0.001)
        outcome.ended = clock()
        ends.append(outcome.ended)

    load, _ = asyncio.run(offer(plan(4), send, 1, closed_loop=True))
    for outcome, previous in zip(load.outcomes[1:], ends, strict=False):
        assert outcome.scheduled >= previous


def test_no_request_is_sent_before_its_time() -> None:
    async def send(request: PlannedRequest, outcome: Outcome, clock: Clock) -> None:
        outcome.sent = outcome.ended = clock()

    load, _ = asyncio.run(offer(plan(5, gap=0.004), send))
    for outcome in load.outcomes:
        assert outcome.scheduled == pytest.approx(outcome.index * 0.004)
        assert outcome.lag >= 0


def test_stopping_keeps_what_was_measured() -> None:
    async def run() -> Load:
        stop = asyncio.Event()

        async def send(request: PlannedRequest, outcome: Outcome, clock: Clock) -> None:
            outcome.sent = clock()
            if request.index == 2:
                stop.set()
            if request.index >= 2:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    outcome.fail("interrupted", "")
                    raise
            outcome.ended = clock()

        return (await offer(plan(10), send, 2, stop=stop))[0]

    load = asyncio.run(run())
    assert load.interrupted
    assert [o.index for o in load.outcomes if o.succeeded] == [0, 1]
    assert {o.error for o in load.outcomes if not o.succeeded} == {"interrupted"}
    assert load.not_sent == 10 - len(load.outcomes)
    assert load.not_sent >= 6


def test_a_defect_is_not_a_quiet_run() -> None:
    async def send(request: PlannedRequest, outcome: Outcome, clock: Clock) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        asyncio.run(offer(plan(2), send))
