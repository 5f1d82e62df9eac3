"""A decoder's weights, layer by layer."""

from dataclasses import dataclass

from torch import Tensor

from kvfold.methods.base import AttentionWeights
from kvfold.model.elementwise import Gate, HeadNorm, Norm
from kvfold.model.linear import Linear


@dataclass(frozen=True)
class Mlp:
    """down(gate(up(x))). `up` gives [T, I], or [T, 2 I] with the gate's columns first when gated."""

    up: Linear
    gate: Gate
    down: Linear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer but for its attention, which methods change. The post norms (Gemma) act on a branch's output
    before it is added."""

    attention_norm: Norm
    mlp_norm: Norm
    mlp: Mlp
    head_norm: HeadNorm | None
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None


@dataclass(frozen=True)
class DecoderWeights:
    """All weights: embedding [V, D] (the head's own when tied), positions [P, D] or None.

    attention: for methods to fold their maps into, one per layer; empty once weights were packed.
    """

    embedding: Tensor
    positions: Tensor | None
    attention: tuple[AttentionWeights, ...]
    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    head: Linear
