"""The best static quantiser of every dimension at every width: offset, step, and the error that is left.

A width of b bits stores round((x - offset) / step) on 2**b levels centred on 0, clamped: level u stands for
offset + step * (u - (2**b - 1) / 2). Width 0 stores nothing and reads back the mean.
"""

import torch
from torch import Tensor

from kvfold.methods.allocation import WIDTHS

# Steps that minimise the mean squared error of a uniform quantiser of a unit Gaussian, by bits
# (J. Max, "Quantizing for minimum distortion", 1960): where the search starts.
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
ROUNDS = 6


def fit_quantisers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: samples [..., n, d]. Returns offset, step and mean squared error, each float32 [..., d, len(WIDTHS)].

    Alternates between assigning levels and the least-squares offset and step for the levels assigned (Lloyd's
    iteration restricted to uniform levels).
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
            fitted = _fit(x, mean, sigma * GAUSSIAN_STEP[bits], bits)
        for kept, value in zip((offsets, steps, errors), fitted, strict=True):
            kept.append(value)
    offset, step, error = (torch.stack(part, -1) for part in (offsets, steps, errors))
    # More bits never do harm: what remains of that in the samples is noise.
    return offset, step, error.cummin(-1).values


def _fit(x: Tensor, offset: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (2**bits - 1) / 2
    mean = x.mean(-2)
    for _ in range(ROUNDS):
        levels = _levels(x, offset, step, top)
        level_mean = levels.mean(-2)
        covariance = (x * levels).mean(-2) - mean * level_mean
        variance = (levels * levels).mean(-2) - level_mean**2
        step = torch.where(variance > 1e-12, covariance / variance.clamp(min=1e-12), step).clamp(min=1e-12)
        offset = mean - step * level_mean
    levels = _levels(x, offset, step, top)
    error = (x - offset.unsqueeze(-2) - step.unsqueeze(-2) * levels).square().mean(-2)
    return offset, step, error


def _levels(x: Tensor, offset: Tensor, step: Tensor, top: float) -> Tensor:
    return (((x - offset.unsqueeze(-2)) / step.unsqueeze(-2)) + top).round_().clamp_(0, 2 * top).sub_(top)
