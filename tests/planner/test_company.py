"""Workers of one machine, and the way to them."""

import math

import pytest

from kvfold.planner.company import Surroundings
from kvfold.planner.errors import PlacementError
from kvfold.planner.placement import Placement
from kvfold.planner.simulator import simulate

from .build import method_profile, requests
from .test_queueing import FIXED, ONE_AT_A_TIME, PROMPT


def first_tokens(times: list[float], workers: int, surroundings: Surroundings) -> list[float | None]:
    sizes = requests(*((at, PROMPT, 1) for at in times))
    profile = method_profile(latency=FIXED)
    result = simulate(sizes, Placement(mixed=workers), profile, ONE_AT_A_TIME, 2**24, surroundings=surroundings)
    return [record.ttft for record in result.records]


def test_steps_take_longer_for_as_long_as_others_compute() -> None:
    """A step of 0.1 s; while both compute, 1.5 s pass for one of work."""
    slow = Surroundings(slowdown=0.5)
    assert first_tokens([0.0, 0.0], 2, slow) == pytest.approx([0.15, 0.15])
    assert first_tokens([0.0, 0.05], 2, slow) == pytest.approx([0.125, 0.125])
    assert first_tokens([0.0, 0.0], 1, slow) == pytest.approx([0.1, 0.2])
    assert first_tokens([0.0, 0.2], 2, slow) == pytest.approx([0.1, 0.1])


def test_the_way_of_a_request_is_waited_for() -> None:
    assert first_tokens([0.0, 0.5], 1, Surroundings(request_overhead=0.03)) == pytest.approx([0.13, 0.13])


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_what_is_no_time_and_no_share_is_refused(value: float) -> None:
    with pytest.raises(PlacementError, match="--request-overhead"):
        Surroundings(request_overhead=value)
    with pytest.raises(PlacementError, match="--slowdown"):
        Surroundings(slowdown=value)
