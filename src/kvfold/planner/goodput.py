"""The highest rate at which enough requests meet both limits: DistServe's goodput, by binary search."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvfold.benchmark.trace import TraceRequest
from kvfold.planner.errors import PlacementError
from kvfold.planner.records import Limits, SimulationResult
from kvfold.planner.workload import at_rate

PRECISION = 1.02
"""Highest rate that misses over highest that holds, when the search ends."""
HALVINGS = 40
SERVED = 0.9
"""Throughput is that of this share of the requests: the last ones have the workers to themselves."""


@dataclass(frozen=True)
class Goal:
    """attainment: share of requests that have to meet both limits, in (0, 1]. Raises PlacementError."""

    limits: Limits
    attainment: float = 0.9

    def __post_init__(self) -> None:
        for name, value in (("--ttft", self.limits.ttft), ("--tpot", self.limits.tpot)):
            if not value > 0:  # NaN too
                raise PlacementError(f"{name} {value:g} is no time limit; give seconds above 0")
        if not 0 < self.attainment <= 1:
            raise PlacementError(f"--attainment {self.attainment:g} is no share; give a number above 0, at most 1")

    def allowed_misses(self, requests: int) -> int:
        return math.floor(requests * (1 - self.attainment) + 1e-9)

    def holds(self, result: SimulationResult) -> bool:
        misses = sum(not record.meets(self.limits) for record in result.records)
        return result.complete and misses <= self.allowed_misses(len(result.records))


Simulate = Callable[[Sequence[TraceRequest], tuple[Limits, int] | None], SimulationResult]
"""Simulates requests on some placement; the second argument is `stop_at` of `simulate`."""


@dataclass(frozen=True)
class Goodput:
    """rate: requests per second, 0 where the goal is out of reach at any; result: the run at that rate, or, at rate 0,
    of requests that never meet. bounded: it is what the workers can finish at all, the limits are not what binds.
    """

    rate: float
    result: SimulationResult
    bounded: bool = False


def alone(requests: Sequence[TraceRequest], simulate: Simulate) -> SimulationResult:
    """Every request by itself: what no rate, however low, improves."""
    together = simulate([replace(request, at=0.0) for request in requests], None)
    # Nothing takes longer alone than all take together.
    return simulate([replace(r, at=2 * i * together.duration) for i, r in enumerate(requests)], None)


def throughput(requests: Sequence[TraceRequest], simulate: Simulate) -> float:
    """Requests per second that are finished while there is always more to do."""
    result = simulate([replace(request, at=0.0) for request in requests], None)
    ends = sorted(record.last for record in result.records if record.last is not None)
    served = max(1, math.floor(SERVED * len(ends)))
    return served / ends[served - 1]


def find_goodput(requests: Sequence[TraceRequest], goal: Goal, simulate: Simulate) -> Goodput:
    """Attainment falls with the rate, but for a request here and there; the search takes it to fall.

    A trace ends, so that a rate above what the workers finish could still meet generous limits for as long as it
    lasts: no such rate counts. Raises PlacementError for a trace that has no rate.
    """
    at_rate(requests, 1.0)
    stop_at = goal.limits, goal.allowed_misses(len(requests))

    def run(rate: float) -> SimulationResult:
        return simulate(at_rate(requests, rate), stop_at)

    high = throughput(requests, simulate)
    result = run(high)
    if goal.holds(result):
        return Goodput(high, result, bounded=True)
    single = alone(requests, simulate)
    if not goal.holds(single):
        return Goodput(0.0, single)
    low, found = 0.0, single
    for _ in range(HALVINGS):
        if low and high <= low * PRECISION:
            break
        rate = math.sqrt(low * high) if low else high / 2
        result = run(rate)
        if goal.holds(result):
            low, found = rate, result
        else:
            high = rate
    return Goodput(low, found)


def curve(requests: Sequence[TraceRequest], goal: Goal, simulate: Simulate, rates: Sequence[float]) -> list[float]:
    """Attainment at each rate."""
    return [simulate(at_rate(requests, rate), None).attainment(goal.limits) for rate in rates]
