"""The parts of a decoder layer that no method touches: normalisation and the MLP."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kvfold.methods.base import AttentionWeights
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
        if self.kind == "layer":
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        if self.weight.dtype != x.dtype:
            return F.rms_norm(x.float(), shape, self.weight, self.eps).to(x.dtype)
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
class Mlp:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated.

    `up` is [I, D], or [2 I, D] with the gate's rows first when gated; `down` is [D, I].
    """

    activation: Activation
    gated: bool
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.up, self.up_bias)
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = activate(gate) * up
        else:
            inner = activate(inner)
        return F.linear(inner, self.down, self.down_bias)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. The post norms (Gemma) act on a branch's output before it is added."""

    attention: AttentionWeights
    attention_norm: Norm
    mlp_norm: Norm
    mlp: Mlp
    head_norm: HeadNorm | None
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights: embedding and head [V, D] (the same tensor when tied), positions [P, D] or None."""

    embedding: Tensor
    positions: Tensor | None
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: Tensor
