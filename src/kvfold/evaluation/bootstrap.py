"""How far a mean may be off: bootstrap intervals over samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` samples with its interval at LEVEL; an interval of one sample is unknown (nan)."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def differs(self) -> bool:
        """Whether the interval leaves 0 out; never for a single sample."""
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The percentile bootstrap of the mean. To compare methods, give their differences sample by sample: what makes a
    sample hard for both then drops out. Raises ValueError where there is no value.
    """
    if not values:
        raise ValueError("no values to estimate a mean from")
    data = np.asarray(values, np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    # How often each sample is drawn is all that a resample is.
    drawn = rng.multinomial(len(data), np.full(len(data), 1 / len(data)), size=RESAMPLES)
    means = drawn @ data / len(data)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), len(data))


def growth(nats: Estimate) -> Estimate:
    """From a difference of mean log-likelihoods to the relative rise of perplexity."""
    return Estimate(math.expm1(nats.mean), math.expm1(nats.low), math.expm1(nats.high), nats.count)
