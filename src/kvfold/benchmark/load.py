"""Sending requests at their times, and stopping in the middle."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time

from kvfold.benchmark.outcome import Outcome
from kvfold.benchmark.workload import PlannedRequest
from kvfold.config.progress import Advance

Send = Callable[[PlannedRequest, Outcome, Callable[[], float]], Awaitable[None]]
"""Sends one request and fills in its outcome, with times of the given clock; raises nothing."""


@dataclass(frozen=True)
class Load:
    """What was measured. duration: seconds from the start to the last end. cpu: share of one core that we used.

    not_sent: requests that were still to come when the run was stopped.
    """

    outcomes: list[Outcome]
    not_sent: int
    duration: float
    cpu: float
    interrupted: bool


async def offer_load(
    plan: Sequence[PlannedRequest],
    send: Send,
    *,
    concurrency: int | None,
    closed_loop: bool,
    stop: asyncio.Event,
    advance: Advance,
) -> Load:
    """Send every request of `plan` and wait for all answers, or until `stop` is set.

    concurrency: most requests in flight. In an open loop a request that finds no place waits, and its latency
    counts from its scheduled time; in a closed loop it is scheduled when a place becomes free.
    """
    places = asyncio.Semaphore(concurrency or len(plan) or 1)
    outcomes: list[Outcome] = []
    began, cpu_began = perf_counter(), process_time()

    def clock() -> float:
        return perf_counter() - began

    async def one(request: PlannedRequest, outcome: Outcome) -> None:
        """Runs with a place taken, and gives it back."""
        try:
            outcomes.append(outcome)
            await send(request, outcome, clock)
        finally:
            places.release()
        advance()

    async def wait_and_send(request: PlannedRequest, outcome: Outcome) -> None:
        waits = places.locked()
        await places.acquire()
        if waits:
            outcome.ready = clock()
        await one(request, outcome)

    async def dispatch() -> None:
        async with asyncio.TaskGroup() as group:
            for request in plan:
                if closed_loop:
                    await places.acquire()
                elif (wait := request.at - clock()) > 0:
                    await asyncio.sleep(wait)
                scheduled = clock() if closed_loop else request.at
                outcome = Outcome(request.index, request.input_tokens, request.output_tokens, scheduled)
                group.create_task((one if closed_loop else wait_and_send)(request, outcome))

    work = asyncio.ensure_future(dispatch())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        interrupted = not work.done()
    finally:
        stopped.cancel()
        work.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
    if not work.cancelled():
        work.result()  # a defect in `send` must not pass as a quiet run
    duration, cpu = clock(), process_time() - cpu_began
    ends = [outcome.ended for outcome in outcomes if outcome.ended is not None]
    return Load(
        sorted(outcomes, key=lambda outcome: outcome.index),
        len(plan) - len(outcomes),
        max(ends, default=duration),
        cpu / duration if duration > 0 else 0.0,
        interrupted,
    )
