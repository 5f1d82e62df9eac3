"""Which placement and method serve most requests in time: DistServe's Algorithms 1 and 2 (arXiv 2401.09670), with the
compression method as a dimension and co-located chunked prefill as an alternative.

Algorithm 1, for fast links: prefill and decode workers are looked at apart, each with its own limit; their rates say
how many of each serve most. Algorithm 2, for slow links: units of a few prefill and decode workers are simulated
together and the best one is repeated. As both limits have to be met by the same request, what Algorithm 1 proposes is
simulated as a whole before it counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from kvfold.benchmark.trace import TraceRequest
from kvfold.config.progress import SILENT, Progress
from kvfold.planner.document import MethodProfile, Profile
from kvfold.planner.errors import PlacementError
from kvfold.planner.goodput import Goal, Goodput, Simulate, find_goodput
from kvfold.planner.placement import Link, Placement
from kvfold.planner.records import Limits, SimulationResult
from kvfold.planner.simulator import simulate

FAST = 0.1
"""A link is fast where handing over a mean request takes less than this share of what TPOT allows it."""
INSIDE = Link(gbps=math.inf)
"""Between workers of one machine: what remains is the copying that the profile measured."""


@dataclass(frozen=True)
class Cluster:
    """workers: how many there are, each with `kv_memory` bytes; link: between machines; node_workers: how many share a
    machine (None: each has its own). Raises PlacementError."""

    workers: int
    kv_memory: int
    link: Link
    node_workers: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--workers", self.workers), ("--node-workers", self.node_workers)):
            if value is not None and not 1 <= value <= 1000:
                raise PlacementError(f"{name} {value} is out of range; give 1 to 1000")


@dataclass(frozen=True)
class Candidate:
    """goodput: requests per second of the whole placement, 0 where the goal is out of reach; `unit` is what was
    simulated, `copies` times make the placement. prefill_rate, decode_rate: of one worker alone (Algorithm 1)."""

    method: str
    unit: Placement
    copies: int
    algorithm: str
    found: Goodput
    link: Link
    prefill_rate: float | None = None
    decode_rate: float | None = None

    @property
    def placement(self) -> Placement:
        return self.unit.times(self.copies)

    @property
    def goodput(self) -> float:
        return self.found.rate * self.copies

    @property
    def per_worker(self) -> float:
        return self.found.rate / self.unit.workers


class Search:
    """algorithm: "1", "2", or "auto", which goes by the link."""

    def __init__(
        self, requests: Sequence[TraceRequest], profile: Profile, goal: Goal, cluster: Cluster, algorithm: str = "auto"
    ) -> None:
        if algorithm not in ("auto", "1", "2"):
            raise PlacementError(f"--algorithm {algorithm!r} is unknown; give auto, 1 (fast links) or 2 (slow links)")
        self.requests, self.profile, self.goal, self.cluster = requests, profile, goal, cluster
        self.algorithm = algorithm
        self.side = cache(self._side)

    def candidates(self, methods: Sequence[str], progress: Progress = SILENT) -> list[Candidate]:
        """The best of each method and kind of placement, the highest goodput first; of equals the fewest workers."""
        found: list[Candidate] = []
        with progress.task("searching placements", 2 * len(methods)) as advance:
            for name in methods:
                method = self.profile.of(name)
                found.append(self.colocated(method))
                advance(1)
                if self.cluster.workers > 1:
                    found.append(self.apart(method) if self.is_fast(method) else self.together(method))
                advance(1)
        return sorted(found, key=lambda c: (-c.goodput, c.placement.workers))

    def is_fast(self, method: MethodProfile) -> bool:
        """Whether Algorithm 1 is the one for a method's handovers."""
        if self.algorithm != "auto":
            return self.algorithm == "1"
        prompt = round(fmean(request.input_tokens for request in self.requests))
        tokens = fmean(request.output_tokens for request in self.requests) - 1
        size = method.pages(self.profile.limits.chunk).wire_bytes(prompt, prompt)
        seconds = self.cluster.link.seconds(size) + method.transfer.seconds(size)
        return seconds <= FAST * tokens * self.goal.limits.tpot

    def colocated(self, method: MethodProfile) -> Candidate:
        unit = Placement(mixed=self.cluster.workers)
        found = self._goodput(self.simulator(method, unit, self.cluster.link))
        return Candidate(method.method, unit, 1, "co-located", found, self.cluster.link)

    def apart(self, method: MethodProfile) -> Candidate:
        """Algorithm 1: as many of each side as balance their rates, and their neighbours."""
        rates = self.side(method.method, True), self.side(method.method, False)
        workers = self.cluster.workers
        splits = [Placement(prefill=p, decode=workers - p) for p in range(1, workers)]
        best = max(range(len(splits)), key=lambda i: _balance(splits[i], rates))
        tried = [
            Candidate(method.method, split, 1, "Algorithm 1", self._split(method, split), self.cluster.link, *rates)
            for split in splits[max(0, best - 1) : best + 2]
        ]
        return max(tried, key=lambda c: c.goodput)

    def together(self, method: MethodProfile) -> Candidate:
        """Algorithm 2: units that fit a machine, simulated as a whole, the best of them repeated.

        A unit that could not beat the best one even if its sides did not hold each other up is not simulated.
        """
        inside = self.cluster.node_workers is not None and self.cluster.node_workers > 1
        link = INSIDE if inside else self.cluster.link
        most = min(self.cluster.node_workers or 0, self.cluster.workers) if inside else self.cluster.workers
        rates = self.side(method.method, True), self.side(method.method, False)
        units = [Placement(prefill=p, decode=n - p) for n in range(2, most + 1) for p in range(1, n)]
        best: Candidate | None = None
        # The most promising first: it spares most of the others.
        for unit in sorted(units, key=lambda u: -self._repeated(u, _balance(u, rates))):
            if best is not None and self._repeated(unit, _balance(unit, rates)) <= best.goodput:
                break
            found = self._goodput(self.simulator(method, unit, link))
            copies = self.cluster.workers // unit.workers
            candidate = Candidate(method.method, unit, copies, "Algorithm 2", found, link, *rates)
            best = candidate if best is None or candidate.goodput > best.goodput else best
        assert best is not None, "two workers make a unit"
        return best

    def simulator(
        self, method: MethodProfile, placement: Placement, link: Link, prompts_read: bool = False
    ) -> Simulate:
        def run(requests: Sequence[TraceRequest], stop_at: tuple[Limits, int] | None) -> SimulationResult:
            limits, memory = self.profile.limits, self.cluster.kv_memory
            return simulate(
                requests, placement, method, limits, memory, link, stop_at=stop_at, prompts_read=prompts_read
            )

        return run

    def _side(self, name: str, prefill: bool) -> float:
        """Goodput of one worker that only reads prompts (TTFT counts) or only decodes (TPOT counts)."""
        method, limits, goal = self.profile.of(name), self.goal.limits, self.goal.attainment
        if prefill:
            requests = [replace(r, output_tokens=1) for r in self.requests]
            run = self.simulator(method, Placement(mixed=1), self.cluster.link)
            return find_goodput(requests, Goal(Limits(limits.ttft, math.inf), goal), run).rate
        run = self.simulator(method, Placement(prefill=1, decode=1), INSIDE, prompts_read=True)
        return find_goodput(self.requests, Goal(Limits(math.inf, limits.tpot), goal), run).rate

    def _goodput(self, run: Simulate) -> Goodput:
        return find_goodput(self.requests, self.goal, run)

    def _split(self, method: MethodProfile, placement: Placement) -> Goodput:
        return self._goodput(self.simulator(method, placement, self.cluster.link))

    def _repeated(self, unit: Placement, rate: float) -> float:
        return rate * (self.cluster.workers // unit.workers)


def _balance(placement: Placement, rates: tuple[float, float]) -> float:
    """What the slower side allows."""
    return min(placement.prefill * rates[0], placement.decode * rates[1])
