"""The best static quantiser of every dimension at every width: offset, step, and the error that is left.

A width of b bits stores round((x - offset) / step) on 2**b levels centred on 0, clamped: level u stands for
offset + step * (u - (2**b - 1) / 2). Width 0 stores nothing and reads back the mean.
"""

import torch
from torch import Tensor

from kvfold.methods.allocation import WIDTHS

# Steps that minimise the mean squared error of a uniform quantiser of a unit Gaussian, by bits
# (J. Max, "Quantizing for minimum distortion", 1960): one end of the search.
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
STARTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # from the Gaussian's step to the one whose levels span all samples
START_SAMPLES = 512  # enough to tell starts apart
ROUNDS = 3
# Another text's rows reach further than those of the text at hand, and clipping the few that do costs more than all
# rounding: quantisers are fitted as if this share of the rows lay so many times further from the mean.
STRETCHED, STRETCH = 0.5, 1.5


def stretched(x: Tensor) -> Tensor:
    """Samples x [..., n, d] in random order -> the same with the first STRETCHED of them moved away from the mean.

    Where levels are few, the best range hardly changes; where they are many, it grows to hold the stretched rows.
    """
    some = round(STRETCHED * x.shape[-2])
    mean = x.mean(-2, keepdim=True)
    return torch.cat([mean + STRETCH * (x[..., :some, :] - mean), x[..., some:, :]], -2)


def fit_quantisers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: samples [..., n, d]. Returns offset, step and mean squared error, each float32 [..., d, len(WIDTHS)].

    Alternates between assigning levels and the least-squares offset and step for the levels assigned (Lloyd's
    iteration restricted to uniform levels). It stays near where it starts, the more so the finer the steps, and
    rows are anything from uniform to long-tailed: so it goes on from the best of several starts.
    """
    mean, sigma = x.mean(-2), x.std(-2).clamp(min=1e-8)
    offsets: list[Tensor] = []
    steps: list[Tensor] = []
    errors: list[Tensor] = []
    for bits in WIDTHS:
        if bits == 0:
            fitted = mean, sigma, x.var(-2, correction=0)
        elif bits == 16:
            fitted = mean, sigma, torch.zeros_like(mean)
        else:
            top = (2**bits - 1) / 2
            fitted = _fit(x, *_start(x, mean, sigma * GAUSSIAN_STEP[bits], top), top)
        for kept, value in zip((offsets, steps, errors), fitted, strict=True):
            kept.append(value)
    offset, step, error = (torch.stack(part, -1) for part in (offsets, steps, errors))
    # More bits never do harm: what remains of that in the samples is noise.
    return offset, step, error.cummin(-1).values


def _start(x: Tensor, mean: Tensor, step: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """The best of the starting offsets and steps, [..., d] each."""
    low, high = x.amin(-2), x.amax(-2)
    spanning = ((high - low) / (2 * top + 1)).clamp(min=1e-12)
    some = x[..., :: max(1, x.shape[-2] // START_SAMPLES), :]
    offsets = torch.stack([mean + t * ((high + low) / 2 - mean) for t in STARTS])
    steps = torch.stack([step * (spanning / step) ** t for t in STARTS])
    errors = torch.stack([_error(some, o, s, top) for o, s in zip(offsets, steps, strict=True)])
    best = errors.argmin(0, keepdim=True)
    return offsets.gather(0, best)[0], steps.gather(0, best)[0]


def _fit(x: Tensor, offset: Tensor, step: Tensor, top: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-2)
    for _ in range(ROUNDS):
        levels = _levels(x, offset, step, top)
        level_mean = levels.mean(-2)
        covariance = (x * levels).mean(-2) - mean * level_mean
        variance = (levels * levels).mean(-2) - level_mean**2
        step = torch.where(variance > 1e-12, covariance / variance.clamp(min=1e-12), step).clamp(min=1e-12)
        offset = mean - step * level_mean
    return offset, step, _error(x, offset, step, top)


def _error(x: Tensor, offset: Tensor, step: Tensor, top: float) -> Tensor:
    levels = _levels(x, offset, step, top)
    return (x - offset.unsqueeze(-2) - step.unsqueeze(-2) * levels).square_().mean(-2)


def _levels(x: Tensor, offset: Tensor, step: Tensor, top: float) -> Tensor:
    return (((x - offset.unsqueeze(-2)) / step.unsqueeze(-2)) + top).round_().clamp_(0, 2 * top).sub_(top)
