"""What cannot be reached at any rate, and what can: the sentence of an impossible goal."""

import math
from collections.abc import Callable, Iterable, Sequence

from kvfold.planner.errors import GoalError
from kvfold.planner.goodput import Goal
from kvfold.planner.records import FORGIVEN, RequestRecord
from kvfold.planner.search import Candidate


def check_reach(candidates: Sequence[Candidate], goal: Goal) -> None:
    """Raises GoalError where no candidate meets the goal even if every request comes alone: it names the limit that
    cannot be met, by how much, and the least that could."""
    if any(candidate.goodput > 0 for candidate in candidates):
        return
    limits = goal.limits
    ttft = min(candidates, key=lambda c: _reached(c, goal, _ttft))
    tpot = min(candidates, key=lambda c: _reached(c, goal, _tpot))

    def both(record: RequestRecord) -> float | None:
        """How many times larger both limits had to be."""
        return max((record.ttft or 0.0) / limits.ttft, (record.tpot or 0.0) / limits.tpot)

    sentences = [
        _sentence(name, limit, best, _reached(best, goal, which), goal)
        for name, best, which, limit in (("TTFT", ttft, _ttft, limits.ttft), ("TPOT", tpot, _tpot, limits.tpot))
        if _reached(best, goal, which) > limit
    ]
    if not sentences:
        # Each limit can be met, but by different placements or requests.
        best = min(candidates, key=lambda c: _reached(c, goal, both))
        factor = _reached(best, goal, both)
        sentences = [
            f"no placement meets TTFT and TPOT together for {goal.attainment:.4g} of these requests at any rate: "
            f"{best.placement} with {best.method} comes nearest; raise --ttft to {_up(factor * limits.ttft)} and "
            f"--tpot to {_up(factor * limits.tpot)}"
        ]
    share = math.floor(1000 * max(c.found.result.attainment(limits) for c in candidates)) / 1000
    rest = f", or lower --attainment to {share:g}" if share else ""
    raise GoalError("; and ".join(sentences) + rest)


def _sentence(name: str, limit: float, best: Candidate, reached: float, goal: Goal) -> str:
    return (
        f"a {name} of {limit:g} s cannot be met by {goal.attainment:.4g} of these requests at any rate: alone on the "
        f"workers they need {_up(reached)} s at best ({best.placement}, {best.method}), {_up(reached - limit)} s more; "
        f"raise --{name.lower()} to {_up(reached)}"
    )


def _reached(candidate: Candidate, goal: Goal, value: Callable[[RequestRecord], float | None]) -> float:
    """The least limit that enough requests would meet, of those that come alone."""
    return _least([value(r) for r in candidate.found.result.records], goal)


def _least(values: Iterable[float | None], goal: Goal) -> float:
    ordered = sorted(0.0 if value is None else value for value in values)
    return ordered[len(ordered) - 1 - goal.allowed_misses(len(ordered))]


def _ttft(record: RequestRecord) -> float | None:
    return record.ttft


def _tpot(record: RequestRecord) -> float | None:
    return record.tpot


def _up(seconds: float) -> str:
    """Three digits, rounded up but for what limits forgive, so that following the advice is enough."""
    if seconds <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return f"{math.ceil(seconds / unit - 100 * FORGIVEN) * unit:.3g}"
