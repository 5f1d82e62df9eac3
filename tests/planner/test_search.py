"""The search on cases whose best placement is known by arithmetic, and what it says where nothing is good enough."""

import math
import re

import pytest

from kvfold.planner.document import EngineLimits, MethodProfile, Profile
from kvfold.planner.errors import GoalError, PlacementError
from kvfold.planner.goodput import Goal, find_goodput
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost
from kvfold.planner.placement import Link, Placement
from kvfold.planner.reach import check_reach
from kvfold.planner.records import Limits
from kvfold.planner.search import Cluster, Search
from kvfold.planner.sizing import size_for

from .build import layout_of, method_profile, profile, requests

READ, DECODE = 0.2, 0.05
# Prompts take 0.2 s each and never share a step, decoding steps 0.05 s however many sequences they have.
CONSTANT = LatencyModel(PrefillCost(READ, 0.0, 0.0), DecodeCost(DECODE, 0.0, 0.0))
EVEN = requests(*((float(i), 64, 2) for i in range(240)))
ONE_PROMPT = EngineLimits(chunk=64, max_batch_tokens=100, max_sequences=30)
# A prompt beside a decoding step makes it 0.2 s long: too long. One decoding step missed (0.1 s) is not.
GOAL = Goal(Limits(ttft=0.3, tpot=0.15), 0.9)


def known(*methods: MethodProfile) -> Profile:
    return profile(*methods, limits=ONE_PROMPT)


def search(workers: int, *methods: MethodProfile, **options: object) -> Search:
    cluster = Cluster(workers, 2**24, Link(gbps=1e6), **options)  # type: ignore[arg-type]
    return Search(EVEN, known(*methods), GOAL, cluster)


def test_two_workers_are_best_together() -> None:
    """Co-located: 1 / 0.25 s each, 8 per second; apart one worker reads 5 per second, and the other waits for it."""
    found = search(2, method_profile(latency=CONSTANT)).candidates(["none"])
    assert [c.placement for c in found] == [Placement(mixed=2), Placement(prefill=1, decode=1)]
    assert [c.goodput for c in found] == pytest.approx([8, 5], rel=0.05)
    assert found[0].per_worker == pytest.approx(4, rel=0.05)


def test_eight_workers_are_best_apart() -> None:
    """Co-located: 32 per second at most; seven that read do 35, and one that decodes is enough for all of them."""
    found = search(8, method_profile(latency=CONSTANT)).candidates(["none"])
    assert found[0].placement == Placement(prefill=7, decode=1)
    assert found[0].goodput == pytest.approx(35, rel=0.06)
    assert found[0].prefill_rate == pytest.approx(5, rel=0.05)
    assert found[1].goodput <= 32.5


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (7.0, [Placement(mixed=2), Placement(prefill=2, decode=1)]),
        (28.0, [Placement(prefill=6, decode=1), Placement(mixed=8)]),
    ],
)
def test_workers_for_a_rate(rate: float, expected: list[Placement]) -> None:
    """The same arithmetic the other way round: 4 per second of a co-located worker, 5 of one that reads."""
    found = size_for(search(1, method_profile(latency=CONSTANT)), rate, ["none"])
    assert [c.placement for c in found] == expected
    assert all(GOAL.holds(c.found.result) for c in found)


def test_units_for_a_rate() -> None:
    cluster = Cluster(1, 2**24, Link(gbps=1e-5), node_workers=3)
    found = size_for(Search(EVEN, known(method_profile(latency=CONSTANT)), GOAL, cluster), 28.0, ["none"])
    assert Placement(prefill=6, decode=3) in [c.placement for c in found]
    with pytest.raises(PlacementError, match="lower --rate"):
        size_for(search(1, method_profile(latency=CONSTANT)), 1e5, ["none"])


def test_pairs_on_machines_of_their_own() -> None:
    """Algorithm 2: units of at most three workers on one machine, of which the best is repeated."""
    cluster = Cluster(7, 2**24, Link(gbps=1e-5), node_workers=3)
    found = Search(EVEN, known(method_profile(latency=CONSTANT)), GOAL, cluster).together(
        method_profile(latency=CONSTANT)
    )
    assert (found.unit, found.copies) == (Placement(prefill=2, decode=1), 2)
    assert found.placement == Placement(prefill=4, decode=2)
    assert found.goodput == pytest.approx(20, rel=0.06)


def test_the_link_decides_on_the_algorithm() -> None:
    method = method_profile(latency=CONSTANT)
    fast, slow = (Search(EVEN, known(method), GOAL, Cluster(2, 2**24, Link(gbps))) for gbps in (100.0, 0.001))
    assert (fast.is_fast(method), slow.is_fast(method)) == (True, False)
    assert Search(EVEN, known(method), GOAL, Cluster(2, 2**24, Link(0.001)), "1").is_fast(method)


def test_the_method_is_chosen_too() -> None:
    """Equal speed per byte: with fewer bytes more sequences keep their pace."""
    latency = LatencyModel(PrefillCost(0.0, 1e-6, 0.0), DecodeCost(0.0, 1e-7, 0.0))
    methods = [method_profile(name, latency) for name in ("none", "kivi(bits=2)")]
    long = requests(*((float(i), 2000, 20) for i in range(60)))
    goal = Goal(Limits(ttft=10.0, tpot=0.3), 0.9)
    best = Search(long, profile(*methods), goal, Cluster(1, 2**28, Link())).candidates(["none", "kivi(bits=2)"])
    assert [c.method for c in best] == ["kivi(bits=2)", "none"]
    assert best[0].goodput > 2 * best[1].goodput


def test_memory_decides_where_speed_does_not() -> None:
    latency = LatencyModel(PrefillCost(0.0, 1e-6, 0.0), DecodeCost(0.01, 0.0, 0.0))
    methods = [method_profile(name, latency) for name in ("none", "kivi(bits=2)")]
    long = requests(*((float(i), 2000, 50) for i in range(80)))
    memory = 2 * layout_of("none").most_pages(2050, 512) * 2048 * 2
    goal = Goal(Limits(ttft=1.0, tpot=0.05), 0.9)
    dense, packed = (
        Search(long, profile(*methods), goal, Cluster(1, memory, Link())).candidates([m.method])[0] for m in methods
    )
    assert packed.goodput > 1.5 * dense.goodput


def test_goodput_is_at_the_edge() -> None:
    """One step less than a miss: at 2 % more, too many requests are late."""
    limits = EngineLimits(chunk=64, max_batch_tokens=64)
    cluster = Cluster(1, 2**24, Link())
    burst = requests(*((float(i // 4), 64, 1) for i in range(80)))
    method = method_profile(latency=CONSTANT)
    run = Search(burst, profile(method, limits=limits), GOAL, cluster).simulator(method, Placement(mixed=1), Link())
    # Bursts of four prompts of 0.2 s each: the last one waits 0.6 s whatever the rate.
    goal = Goal(Limits(0.75, math.inf), 0.75)
    found = find_goodput(burst, goal, run)
    assert found.rate > 0
    assert goal.holds(found.result)
    assert find_goodput(burst, Goal(Limits(0.75, math.inf), 0.8), run).rate == 0


def test_one_moment_has_no_rate() -> None:
    method = method_profile(latency=CONSTANT)
    with pytest.raises(PlacementError, match="take more --requests"):
        Search(requests((0.0, 5, 5)), known(method), GOAL, Cluster(1, 2**24, Link())).candidates(["none"])


def reach(ttft: float, tpot: float) -> str:
    goal = Goal(Limits(ttft, tpot), 0.9)
    candidates = Search(EVEN, known(method_profile(latency=CONSTANT)), goal, Cluster(2, 2**24, Link(1e6))).candidates(
        ["none"]
    )
    with pytest.raises(GoalError) as caught:
        check_reach(candidates, goal)
    return str(caught.value)


def test_impossible_limits_are_named_with_the_best_that_can() -> None:
    ttft = reach(0.1, 1.0)
    assert "a TTFT of 0.1 s cannot be met by 0.9 of these requests at any rate" in ttft
    assert "0.2 s at best" in ttft
    assert "0.1 s more; raise --ttft to 0.2" in ttft
    assert "TPOT" not in ttft
    tpot = reach(1.0, 0.04)
    assert "a TPOT of 0.04 s" in tpot
    assert re.search(r"0\.01 s more; raise --tpot to 0\.05", tpot)
    assert "TTFT" not in tpot
    both = reach(0.1, 0.04)
    assert "TTFT" in both
    assert "TPOT" in both


def test_following_the_advice_is_enough() -> None:
    sizes = requests(*((float(i), 10 + 37 * i % 300, 2 + i % 9) for i in range(60)))
    method = method_profile()
    cluster = Cluster(1, 2**26, Link())
    goal = Goal(Limits(1e-3, 1e-4), 0.8)
    with pytest.raises(GoalError) as caught:
        check_reach(Search(sizes, profile(method), goal, cluster).candidates(["none"]), goal)
    found = re.findall(r"raise --t[tp][fo]t to ([0-9.e-]+[0-9])", str(caught.value))
    eased = Goal(Limits(*map(float, found)), 0.8)
    candidates = Search(sizes, profile(method), eased, cluster).candidates(["none"])
    try:
        check_reach(candidates, eased)
    except GoalError as error:  # each limit is met, by 0.8 of the requests, but not by the same ones
        assert "TTFT and TPOT together" in str(error)  # noqa: PT017
