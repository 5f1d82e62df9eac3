"""The fit: known costs are found again, none is negative, and the quadratic term does not mind how a prompt is cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.planner.errors import ProfileError
from kvfold.planner.fit import Point, fit_latency, nonnegative_least_squares, relative_error
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost, StepWork, chunk_squares
from kvfold.planner.measure import transfer_cost

COST = st.floats(1e-3, 1.0)
PREFILLS = [StepWork(n, chunk_squares(p, n)) for n, p in ((16, 0), (128, 0), (512, 0), (512, 512), (512, 1024))]
DECODES = [StepWork(0, 0, b * c * 1000, b) for b in (1, 2, 4, 8, 16, 32) for c in (100, 1000)]


def measured(model: LatencyModel) -> list[Point]:
    return [Point(work, model.seconds(work)) for work in (*PREFILLS, *DECODES)]


@given(COST, COST, COST, COST, COST, COST)
@settings(max_examples=20)
def test_known_costs_are_found_again(a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    model = LatencyModel(PrefillCost(a, b * 1e-3, c * 1e-6), DecodeCost(d, e * 1e-9, f * 1e-2))
    found = fit_latency(measured(model))
    assert found.decode_above is None
    for part in ("prefill", "decode"):
        for name, value in vars(getattr(model, part)).items():
            assert getattr(getattr(found, part), name) == pytest.approx(value, rel=1e-6), (part, name)


@pytest.mark.parametrize("knee", [2, 4, 8])
def test_a_knee_is_found_where_it_is(knee: int) -> None:
    below, above = DecodeCost(0.02, 1e-9, 1e-4), DecodeCost(0.005, 1e-9, 4e-3)
    model = LatencyModel(PrefillCost(0.01, 1e-3, 1e-9), below, above, knee)
    found = fit_latency(measured(model))
    assert found.knee == knee
    assert found.decode_above is not None
    assert all(abs(relative_error(found, point)) < 1e-6 for point in measured(model))


def test_points_held_out_and_mixed_ones_are_not_fitted() -> None:
    model = LatencyModel(PrefillCost(0.01, 1e-3, 1e-9), DecodeCost(0.02, 1e-9, 1e-4))
    others = [Point(PREFILLS[0], 77.0, held_out=True), Point(StepWork(64, 4096, 10**6, 2), 99.0)]
    found, expected = fit_latency([*measured(model), *others]), fit_latency(measured(model))
    assert found == expected


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=3, max_size=8),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
)
def test_no_coefficient_is_negative_and_none_is_better(rows: list[list[float]], other: list[float]) -> None:
    matrix, target = np.array(rows), np.ones(len(rows))
    found, error = nonnegative_least_squares(matrix, target)
    assert (found >= 0).all()
    rest = matrix @ np.abs(other) - target
    assert error <= float(rest @ rest) + 1e-9


def test_a_knee_is_not_made_of_noise() -> None:
    model = LatencyModel(PrefillCost(0.01, 1e-3, 1e-9), DecodeCost(0.02, 1e-9, 1e-3))
    rng = np.random.default_rng(0)
    noisy = [Point(p.work, p.seconds * (1 + 0.03 * rng.standard_normal())) for p in measured(model)]
    found = fit_latency(noisy)
    assert max(abs(relative_error(found, point)) for point in measured(model)) < 0.05


def test_a_step_that_was_held_up_moves_little() -> None:
    model = LatencyModel(PrefillCost(0.01, 1e-3, 1e-9), DecodeCost(0.02, 1e-9, 1e-3))
    points = measured(model)
    late = [Point(p.work, p.seconds * (3 if i in (6, 11) else 1)) for i, p in enumerate(points)]
    found = fit_latency(late)
    assert max(abs(relative_error(found, point)) for point in points) < 0.02


def test_too_few_points() -> None:
    model = LatencyModel(PrefillCost(0.01, 1e-3, 1e-9), DecodeCost(0.02, 1e-9, 1e-3))
    with pytest.raises(ProfileError, match="measure a larger grid"):
        fit_latency([Point(work, model.seconds(work)) for work in (*PREFILLS[:2], *DECODES)])
    with pytest.raises(ProfileError, match="measure a grid"):
        transfer_cost([])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_squares_of_chunks_add_up(chunks: list[int]) -> None:
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    assert sum(chunk_squares(p, n) for p, n in zip(starts, chunks, strict=True)) == sum(chunks) ** 2


def test_a_mixed_step_reads_the_weights_once() -> None:
    model = LatencyModel(PrefillCost(0.03, 1e-3, 0), DecodeCost(0.02, 0, 1e-3))
    assert model.seconds(StepWork(10, 100, 0, 5)) == pytest.approx(0.03 + 0.01 + 0.005)


def test_copying_costs_are_found_again() -> None:
    cost = transfer_cost([(size, 1e-3 + size / 2e9) for size in (10**6, 10**7, 10**8)])
    assert (cost.overhead, cost.bytes_per_second) == (pytest.approx(1e-3), pytest.approx(2e9))
    assert transfer_cost([(10, 0.5), (20, 0.5)]).bytes_per_second > 0
