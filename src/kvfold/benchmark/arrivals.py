"""When requests arrive: a renewal process with gamma-distributed gaps."""

import math
from random import Random

from kvfold.errors import ConfigError


def arrival_times(count: int, rate: float, burstiness: float, rng: Random) -> list[float]:
    """`count` ascending arrival times in seconds, the first at 0.

    rate: mean requests per second; `inf` puts all at 0. burstiness: shape of the gamma distribution of the
    gaps, whose coefficient of variation is 1/sqrt(burstiness): 1 is a Poisson process, less is burstier, more
    is more regular. Raises ConfigError if a figure is out of range.
    """
    if not rate > 0:
        raise ConfigError(f"--rate {rate:g} sends nothing; give requests per second above 0, or inf for all at once")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness {burstiness:g} is no gamma shape; give a number above 0 (1 is Poisson)")
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        if rate < math.inf:
            now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return times
