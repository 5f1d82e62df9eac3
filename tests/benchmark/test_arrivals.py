"""Gaps between arrivals have the mean and the variation that were asked for."""

from random import Random

import numpy as np
import pytest

from kvfold.benchmark.arrivals import arrival_times
from kvfold.errors import ConfigError

COUNT = 20_000


@pytest.mark.parametrize("rate", [0.5, 40.0])
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_wanted_mean_and_variation(rate: float, burstiness: float) -> None:
    times = arrival_times(COUNT, rate, burstiness, Random(1))
    gaps = np.diff(times)
    cv = burstiness**-0.5
    assert times[0] == 0
    assert (gaps >= 0).all()
    # Five standard errors of the mean of COUNT gaps.
    assert gaps.mean() * rate == pytest.approx(1, abs=5 * cv / COUNT**0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_poisson_counts_have_equal_mean_and_variance() -> None:
    times = arrival_times(COUNT, 10.0, 1.0, Random(2))
    counts = np.bincount(np.floor(times).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.2)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(5, float("inf"), 1.0, Random(0)) == [0.0] * 5


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0), (1, float("inf"))])
def test_impossible_figures_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match=r"--rate|--burstiness"):
        arrival_times(1, rate, burstiness, Random(0))
