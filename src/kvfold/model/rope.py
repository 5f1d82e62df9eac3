"""Rotary position embedding (RoPE), once per step and kind of layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and signed sines of one step's positions, both [T, 1, d]: broadcast over heads."""

    cos: Tensor
    sin: Tensor

    def take(self, tokens: slice) -> "Rotation":
        """The rotation of a range of the step's tokens."""
        return Rotation(self.cos[tokens], self.sin[tokens])


def rotation(inv_freq: Tensor, attention_factor: float, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Angles of `positions` [T] for `inv_freq` [d / 2] float32, computed in float32, returned as `dtype`.

    Computed from the positions of the step instead of indexed from a table: three small operations
    per step, no memory in the number of positions. The first half of the sines is negated, so that
    rotating is x * cos + swap(x) * sin, where swap exchanges the two halves of a head.
    """
    angles = positions.float().unsqueeze(1) * inv_freq
    cos = angles.cos() * attention_factor
    sin = angles.sin() * attention_factor
    return Rotation(
        torch.cat((cos, cos), dim=1).unsqueeze(1).to(dtype),
        torch.cat((-sin, sin), dim=1).unsqueeze(1).to(dtype),
    )


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate heads x [T, heads, d] by their tokens' angles; same shape and dtype."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * by.cos, swapped, by.sin)
