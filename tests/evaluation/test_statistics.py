"""Intervals against the normal distribution's closed form, the Pareto front against its definition, SQuAD's rules."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.evaluation.answers import exact_match, f1
from kvfold.evaluation.bootstrap import estimate, growth
from kvfold.evaluation.pareto import pareto_front

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


def test_the_interval_is_the_closed_form_for_many_normal_values() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(values.tolist())
    error = values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_of_two_values_is_that_of_the_binomial() -> None:
    """Of 8 zeros and 8 ones a resample's mean is Binomial(16, 1/2) / 16; its 2.5 % quantile is 4."""
    found = estimate([0.0] * 8 + [1.0] * 8)
    assert (found.mean, found.low, found.high) == (0.5, 4 / 16, 12 / 16)


@given(VALUES, st.floats(-50, 50))
def test_an_interval_holds_the_mean_and_moves_with_the_values(values: list[float], by: float) -> None:
    found, moved = estimate(values), estimate([value + by for value in values])
    assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert min(values) - 1e-9 <= found.low
    assert found.high <= max(values) + 1e-9
    assert moved.low == pytest.approx(found.low + by, abs=1e-9)
    assert estimate(values) == found


def test_one_sample_tells_no_interval() -> None:
    found = estimate([2.0])
    assert math.isnan(found.low)
    assert not found.differs
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_growth_of_perplexity() -> None:
    assert growth(estimate([math.log(1.1)] * 3)).mean == pytest.approx(0.1)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_front_is_what_nobody_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(point: tuple[int, int]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    expected = sorted(i for i, point in enumerate(points) if not dominated(point))
    assert sorted(pareto_front(points)) == expected


@pytest.mark.parametrize(
    ("answer", "right", "exact", "overlap"),
    [
        ("The Panthers.", ["panthers"], 1, 1),
        ("308 points", ["308"], 0, 2 / 3),
        ("four", ["five", "the four"], 1, 1),
        ("", ["x"], 0, 0),
        ("a b b", ["b c"], 0, 0.5),  # articles do not count: [b, b] against [b, c]
    ],
)
def test_answers_are_judged_by_squads_rules(answer: str, right: list[str], exact: float, overlap: float) -> None:
    assert exact_match(answer, right) == exact
    assert f1(answer, right) == pytest.approx(overlap)
