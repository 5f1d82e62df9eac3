"""What a decoder does number by number: normalisation and activations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kvfold.model.spec import Activation

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm over the last dimension; statistics in float32, result in the input's dtype.

    A weight in float32 beside activations in bfloat16 is applied before rounding: Gemma's 1 + w
    would lose most of w's precision in bfloat16.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if self.weight.dtype != x.dtype:
            return self._apply(x.float(), shape).to(x.dtype)
        return self._apply(x, shape)

    def _apply(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, shape, self.weight, self.eps)


@dataclass(frozen=True)
class HeadNorm:
    """QK norm: RMSNorm over each head's d dimensions, for queries and keys in one operation.

    `weight` is [H + G, d]: the query gain repeated H times, then the key gain G times.
    """

    weight: Tensor
    eps: float

    def __call__(self, qk: Tensor) -> Tensor:
        """Normalise qk [T, H + G, d]."""
        x = qk.to(self.weight.dtype)
        return (F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight).to(qk.dtype)


@dataclass(frozen=True)
class Gate:
    """An MLP's activation: act(x), or of x = [gate, up] side by side act(gate) * up."""

    activation: Activation
    gated: bool

    def __call__(self, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        if not self.gated:
            return activate(x)
        gate, up = x.chunk(2, dim=-1)
        return activate(gate) * up
