"""A linear layer as the decoder sees it: with what comes before and after it, which some implementations fuse."""

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from kvfold.methods.base import AttentionWeights
from kvfold.model.elementwise import Gate, Norm


class Linear(Protocol):
    def __call__(self, x: Tensor, before: Norm | Gate | None = None, onto: Tensor | None = None) -> Tensor:
        """before(x) W^T + bias + onto: x [T, inputs] (as many as `before` takes) to [T, rows], same dtype."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that a call reads of the weights."""
        ...


@dataclass(frozen=True)
class TorchLinear:
    """weight: [rows, inputs]; bias: [rows] or None. Differentiable."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, before: Norm | Gate | None = None, onto: Tensor | None = None) -> Tensor:
        y = F.linear(x if before is None else before(x), self.weight, self.bias)
        return y if onto is None else onto + y

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(frozen=True)
class Projections:
    """One layer's attention weights as they are run; maps as in `AttentionWeights`."""

    qkv: Linear
    out: Linear
    query_map: Tensor | None = None
    key_map: Tensor | None = None
    key_shift: Tensor | None = None

    @classmethod
    def of(cls, weights: AttentionWeights) -> "Projections":
        qkv, out = TorchLinear(weights.qkv, weights.qkv_bias), TorchLinear(weights.out, weights.out_bias)
        return cls(qkv, out, weights.query_map, weights.key_map, weights.key_shift)
