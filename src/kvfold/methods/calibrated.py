"""What calibration says of keys and values: bases where few bits matter, and a quantiser per dimension and width."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kvfold.methods.allocation import WIDTHS
from kvfold.methods.base import CacheShape

MapName = Literal["optimal", "stacked"]
SIDES = ("key", "value")
FIELDS = ("a", "b", "offset", "step", "error", "weight")


@dataclass(frozen=True)
class Affine:
    """x' = x @ forward + shift in code units, and x = x' @ backward.mT + origin; [L, G, d, d] and [L, G, d]."""

    forward: Tensor
    shift: Tensor
    backward: Tensor
    origin: Tensor


@dataclass(frozen=True)
class Side:
    """Keys or values of all heads in the calibrated basis: maps [L, G, d, d], quantisers [L, G, d, widths].

    error: mean squared error of a dimension at each width; weight [L, G, d]: what that error costs.
    """

    a: Tensor
    b: Tensor
    offset: Tensor
    step: Tensor
    error: Tensor
    weight: Tensor

    @classmethod
    def read(cls, statistics: Mapping[str, Tensor], map_name: str, side: str) -> "Side":
        return cls(*(statistics[f"{map_name}.{side}.{field}"] for field in FIELDS))

    def in_code_units(self, bits: np.ndarray) -> Affine:
        """The maps with each dimension's quantiser folded in and dimensions ordered widest first."""
        order = ordered(bits)[1]
        which = torch.searchsorted(torch.tensor(WIDTHS), torch.from_numpy(np.ascontiguousarray(bits)))[..., None]
        offset, step = (
            table.gather(-1, which)[..., 0].double().gather(-1, order) for table in (self.offset, self.step)
        )
        columns = order[..., None, :].expand_as(self.a)
        a, b = (m.double().gather(-1, columns) for m in (self.a, self.b))
        backward = b * step[..., None, :]
        origin = (b @ offset[..., None])[..., 0]
        return Affine(a / step[..., None, :], -offset / step, backward, origin)


def ordered(bits: np.ndarray) -> tuple[Tensor, Tensor]:
    """Widths of every head, widest first, and which dimensions they are of, [L, G, d]."""
    widths = torch.from_numpy(np.ascontiguousarray(bits))
    return torch.sort(widths, dim=-1, descending=True, stable=True)


def flat_statistics(shape: CacheShape) -> dict[str, Tensor]:
    """Statistics that tell dimensions and heads not apart: what a cache costs before anything is calibrated."""
    d = shape.head_dim
    heads = (shape.layers, shape.kv_heads)
    identity = torch.eye(d).expand(*heads, d, d)
    flat = torch.ones(*heads, d, len(WIDTHS))
    loss = torch.tensor([4.0**-bits for bits in WIDTHS]).expand_as(flat)
    values = (identity, identity, 0 * flat, flat, loss, torch.ones(*heads, d))
    return {
        f"{name}.{side}.{field}": x
        for name in get_args(MapName)
        for side in SIDES
        for field, x in zip(FIELDS, values, strict=True)
    }
