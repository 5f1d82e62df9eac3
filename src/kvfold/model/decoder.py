"""The decoder: one block for every family, over a flattened batch of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.methods.base import AttentionWeights
from kvfold.model.blocks import DecoderWeights, LayerWeights
from kvfold.model.elementwise import HeadNorm, Norm
from kvfold.model.heads import SplitHeads, split_heads
from kvfold.model.linear import Projections
from kvfold.model.packed import pack_projections, pack_weights
from kvfold.model.packed_heads import MOST_DIM, split_heads_packed
from kvfold.model.rope import Rotation, rotation
from kvfold.model.spec import ModelSpec


class Attend(Protocol):
    """Attention of one lane in one layer; masks, softmax scale and the cache are its business."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, d], new k and v [T, G, d], after RoPE and maps -> [T, H, d], same dtype.

        T counts the lane's tokens only. The inputs may have any strides; they are not to be mutated.
        """
        ...


@dataclass
class Lane:
    """A range of a batch's tokens that shares one compression method.

    `weights` has one entry per layer (the decoder's own projections, or a method's folded ones). Norms, MLP and
    embeddings are shared by all lanes.
    """

    tokens: slice
    weights: Sequence[Projections]
    attend: Attend


class Decoder:
    """A decoder-only model. Weights carry no gradient; activations may (calibration differentiates).

    dtype: of activations, which packing does not change. `projections` are those of the unchanged model, one per layer.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = weights.embedding.dtype
        self.projections = [Projections.of(own) for own in weights.attention]
        self._split_heads: SplitHeads = split_heads
        self._angles = self.dtype
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=self.dtype))
        kinds = list(spec.rope_kinds())
        self.rope_kinds = [
            (torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device), kind.attention_factor)
            for kind in kinds
        ]
        self.rope_kind_of_layer = [
            None if layer.rope is None else kinds.index(layer.rope) for layer in spec.layer_specs
        ]

    @property
    def attention_weights(self) -> Sequence[AttentionWeights]:
        """What methods fold their maps into; nothing once weights were packed."""
        return self.weights.attention

    @property
    def device(self) -> torch.device:
        """Device of weights and activations."""
        return self.weights.embedding.device

    def forward(self, token_ids: Tensor, positions: Tensor, lanes: Sequence[Lane]) -> Tensor:
        """Hidden states after the final norm, [T, D].

        token_ids and positions: [T] int64, the sequences of a batch concatenated without padding.
        Lanes: consecutive, together exactly the T tokens; raises ValueError otherwise.
        """
        _check_lanes(lanes, token_ids.shape[0])
        x = self.embed(token_ids, positions)
        rotations = self.rotations(positions)
        for index, layer in enumerate(self.weights.layers):
            kind = self.rope_kind_of_layer[index]
            by = None if kind is None else rotations[kind]
            x = self._attention(index, layer, x, by, lanes)
            inner = layer.mlp.up(x, layer.mlp_norm)
            if layer.post_mlp_norm is None:
                x = layer.mlp.down(inner, layer.mlp.gate, x)
            else:
                x = x + layer.post_mlp_norm(layer.mlp.down(inner, layer.mlp.gate))
        return self.weights.final_norm(x)

    def pack(self, bits: int) -> None:
        """Packs all weights for the compiled kernels, embeddings to 16 bits: for inference only, nothing can be folded
        any more. bits: as in `PackedLinear`. Raises KernelsUnavailable."""
        self.weights = pack_weights(self.weights, bits)
        self.projections = pack_projections(self.projections, bits)
        if self.spec.head_dim <= MOST_DIM:
            self._split_heads, self._angles = split_heads_packed, torch.float32

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states [N, D]: [N, V] float32."""
        return self.weights.head(hidden).float()

    def rotations(self, positions: Tensor) -> list[Rotation]:
        """The angles of a step, one entry per kind of RoPE that the layers have."""
        return [rotation(*kind, positions, self._angles) for kind in self.rope_kinds]

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer, [T, D]."""
        x = F.embedding(token_ids, self.weights.embedding).to(self.dtype)
        if self.spec.embed_scale != 1.0:
            x = x * self._embed_scale
        if self.weights.positions is not None:
            x = x + F.embedding(positions, self.weights.positions)
        return x

    def _attention(
        self, index: int, layer: LayerWeights, x: Tensor, by: Rotation | None, lanes: Sequence[Lane]
    ) -> Tensor:
        """x [T, D] with the attention of all lanes added."""
        outputs = []
        for lane in lanes:
            weights, own = lane.weights[index], x[lane.tokens]
            lane_by = None if by is None else by.take(lane.tokens)
            q, k, v = self._project(weights, own, layer.attention_norm, layer.head_norm, lane_by)
            attended = lane.attend(index, q, k, v).flatten(1)
            if layer.post_attention_norm is None:
                outputs.append(weights.out(attended, onto=own))
            else:
                outputs.append(own + layer.post_attention_norm(weights.out(attended)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _project(
        self, weights: Projections, x: Tensor, norm: Norm, head_norm: HeadNorm | None, by: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        qkv = weights.qkv(x, norm).view(x.shape[0], spec.heads + 2 * spec.kv_heads, spec.head_dim)
        return self._split_heads(qkv, spec.heads, weights, head_norm, by)


def _check_lanes(lanes: Sequence[Lane], tokens: int) -> None:
    end = 0
    for lane in lanes:
        start, stop, step = lane.tokens.indices(tokens)
        if start != end or step != 1:
            raise ValueError(f"lane {lane.tokens} does not start at token {end}: lanes must be consecutive")
        end = stop
    if end != tokens:
        raise ValueError(f"lanes cover {end} of {tokens} tokens: every token belongs to one lane")
