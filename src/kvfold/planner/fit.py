"""From measured steps to a latency model: least squares on relative errors, no cost below zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvfold.planner.errors import ProfileError
from kvfold.planner.latency import DecodeCost, LatencyModel, PrefillCost, StepWork

LEAST_POINTS = 3
"""As many as a cost has coefficients."""
KNEE_COEFFICIENTS = 7
"""Two costs of three, and the knee."""
KNEE_GAIN = 0.75
"""A knee is taken where it leaves less than this share of the variance: two costs always fit a little better."""
GOOD = 0.01
"""Relative error that needs no explanation: neither a knee nor a lesser weight."""
FAR = 2.0
"""Times the median error: what lies further out is taken to have been held up."""
ROUNDS = 12


@dataclass(frozen=True)
class Point:
    """A measured step: `seconds` is the median of its repetitions. held_out: the fit did not see it."""

    work: StepWork
    seconds: float
    held_out: bool = False


def nonnegative_least_squares(
    matrix: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """x >= 0 that makes |matrix x - target|^2 least, and that error.

    The solution is the unconstrained one over the coefficients that are not zero; with a handful of columns all
    choices of those can be tried, which needs no tolerance and no iteration.
    """
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(target @ target)
    for count in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), count)):
            # Bytes and counts differ by many orders of magnitude.
            scale = np.linalg.norm(matrix[:, chosen], axis=0)
            if not scale.all():
                continue
            found = np.linalg.lstsq(matrix[:, chosen] / scale, target, rcond=None)[0] / scale
            rest = matrix[:, chosen] @ found - target
            error = float(rest @ rest)
            if (found >= 0).all() and error < least:
                least = error
                best = np.zeros(columns)
                best[chosen] = found
    return best, least


def fit_prefill(points: Sequence[Point]) -> PrefillCost:
    """Raises ProfileError for fewer than three points."""
    rows = [(1.0, p.work.tokens, p.work.squares) for p in points]
    return PrefillCost(*_relative(rows, points)[0])


def fit_decode(points: Sequence[Point]) -> tuple[DecodeCost, DecodeCost | None, int]:
    """The cost below the knee, the one above it (None: one serves all) and the knee, the largest batch below it.

    Every batch size that leaves three points on both sides, of two batch sizes each, is tried as the knee.
    """
    one, error = _decode(points)
    best: tuple[DecodeCost, DecodeCost | None, int] = (one, None, 0)
    count = len(points)
    if count <= KNEE_COEFFICIENTS or error <= count * GOOD**2:
        return best
    least = KNEE_GAIN * error * (count - KNEE_COEFFICIENTS) / (count - LEAST_POINTS)
    sizes = sorted({p.work.batch for p in points})
    for knee in sizes[1:-2]:
        sides = [p for p in points if p.work.batch <= knee], [p for p in points if p.work.batch > knee]
        if min(map(len, sides)) < LEAST_POINTS:
            continue
        (below, left), (above, right) = map(_decode, sides)
        if left + right < least:
            best, least = (below, above, knee), left + right
    return best


def fit_latency(points: Sequence[Point]) -> LatencyModel:
    """Fits to the points that are not held out; those with prompts and decoding sequences together are never used:
    what such a step takes follows from the two costs. Raises ProfileError where there are too few."""
    seen = [p for p in points if not p.held_out]
    prefill = fit_prefill([p for p in seen if not p.work.batch])
    return LatencyModel(prefill, *fit_decode([p for p in seen if not p.work.tokens]))


def relative_error(model: LatencyModel, point: Point) -> float:
    """How much longer than measured a step takes by the model, as a share."""
    return model.seconds(point.work) / point.seconds - 1


def _decode(points: Sequence[Point]) -> tuple[DecodeCost, float]:
    found, error = _relative([(1.0, p.work.kv_bytes, p.work.batch) for p in points], points)
    return DecodeCost(*found), error


def _relative(rows: Sequence[tuple[float, float, float]], points: Sequence[Point]) -> tuple[list[float], float]:
    """Huber's estimate: a point that lies far out, as a step does that something else on the machine held up, counts
    by its distance instead of its square."""
    if len(points) < LEAST_POINTS:
        raise ProfileError(f"{len(points)} measured steps do not fix {LEAST_POINTS} costs; measure a larger grid")
    seconds = np.array([p.seconds for p in points])
    matrix, ones = np.array(rows, float) / seconds[:, None], np.ones(len(points))
    weights = ones
    for _ in range(ROUNDS):
        found, error = nonnegative_least_squares(matrix * weights[:, None], weights)
        distance = np.abs(matrix @ found - 1)
        usual = max(FAR * float(np.median(distance)), GOOD)
        before, weights = weights, np.sqrt(np.minimum(1, usual / np.maximum(distance, usual)))
        if np.allclose(before, weights):
            break
    return found.tolist(), error
