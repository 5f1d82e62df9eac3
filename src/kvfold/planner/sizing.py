"""How many workers a wanted rate needs: the last step of DistServe's algorithms, which repeats what serves best until
it is enough. What comes out is simulated at that rate, and grows until it holds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvfold.config.progress import SILENT, Progress
from kvfold.planner.document import MethodProfile
from kvfold.planner.errors import PlacementError
from kvfold.planner.goodput import Goodput, find_goodput
from kvfold.planner.placement import Placement
from kvfold.planner.records import SimulationResult
from kvfold.planner.search import Candidate, Search
from kvfold.planner.workload import at_rate

MOST_WORKERS = 1000
UNIT = 4
"""Workers of Algorithm 2's largest unit where machines do not say."""


def size_for(search: Search, rate: float, methods: Sequence[str], progress: Progress = SILENT) -> list[Candidate]:
    """The fewest workers of each method and kind of placement that serve `rate` requests per second, fewest first;
    those that never meet the goal come last, with goodput 0. Raises PlacementError for more than a thousand workers."""
    at_rate(search.requests, rate)
    found: list[Candidate] = []
    with progress.task("searching placements", 2 * len(methods)) as advance:
        for name in methods:
            method = search.profile.of(name)
            found.append(_colocated(search, method, rate))
            advance(1)
            found.append(_apart(search, method, rate) if search.is_fast(method) else _units(search, method, rate))
            advance(1)
    return sorted(found, key=lambda c: (not c.goodput, c.placement.workers))


def _colocated(search: Search, method: MethodProfile, rate: float) -> Candidate:
    one = Placement(mixed=1)
    single = find_goodput(search.requests, search.goal, search.simulator(method, one, search.cluster.link))
    start = Candidate(method.method, one, 1, "co-located", single, search.cluster.link)
    if not single.rate:
        return start
    return _grown(search, start, Placement(mixed=math.ceil(rate / single.rate)), rate, lambda p, _: (p.mixed + 1, 0, 0))


def _apart(search: Search, method: MethodProfile, rate: float) -> Candidate:
    """Algorithm 1: each side by itself; where both together miss, the side that misses more gets another worker."""
    sides = search.side(method.method, True), search.side(method.method, False)
    pair, link = Placement(prefill=1, decode=1), search.cluster.link
    found = find_goodput(search.requests, search.goal, search.simulator(method, pair, link))
    start = Candidate(method.method, pair, 1, "Algorithm 1", found, link, *sides)
    if not found.rate or not all(sides):
        return replace(start, found=replace(found, rate=0.0))

    def more(placement: Placement, result: SimulationResult) -> tuple[int, int, int]:
        limits = search.goal.limits
        late = sum(not r.in_time(limits) for r in result.records)
        slow = sum(not r.fluent(limits) for r in result.records)
        return (0, placement.prefill + (late >= slow), placement.decode + (late < slow))

    least = Placement(prefill=math.ceil(rate / sides[0]), decode=math.ceil(rate / sides[1]))
    return _grown(search, start, least, rate, more)


def _units(search: Search, method: MethodProfile, rate: float) -> Candidate:
    """Algorithm 2: the best unit, as often as it takes."""
    size = max(2, search.cluster.node_workers or UNIT)
    best = Search(
        search.requests, search.profile, search.goal, replace(search.cluster, workers=size), search.algorithm
    ).together(method)
    if not best.found.rate:
        return best
    return replace(best, copies=_checked(math.ceil(rate / best.found.rate), best.unit, rate))


def _grown(
    search: Search,
    start: Candidate,
    least: Placement,
    rate: float,
    more: Callable[[Placement, SimulationResult], tuple[int, int, int]],
) -> Candidate:
    requests, method, unit = at_rate(search.requests, rate), search.profile.of(start.method), least
    while True:
        _checked(1, unit, rate)
        result = search.simulator(method, unit, start.link)(requests, None)
        if search.goal.holds(result):
            return replace(start, unit=unit, found=Goodput(rate, result))
        unit = Placement(*more(unit, result))


def _checked(copies: int, unit: Placement, rate: float) -> int:
    if copies * unit.workers > MOST_WORKERS:
        raise PlacementError(f"{rate:g} requests per second need more than {MOST_WORKERS} workers; lower --rate")
    return copies
