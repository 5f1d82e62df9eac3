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
from kvfold.model.linear import Projections
from kvfold.model.packed import pack_projections, pack_weights
from kvfold.model.rope import Rotation, rotate, rotation
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

    dtype: of activations; None: the weights'. `projections` are those of the unchanged model, one per layer.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, dtype: torch.dtype | None = None) -> None:
        self.spec = spec
        self.weights = weights
        self.dtype = dtype or weights.embedding.dtype
        self.projections = [Projections.of(own) for own in weights.attention]
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=self.dtype))
        kinds = list(spec.rope_kinds())
        self._rope_kinds = [
            (torch.tensor(kind.inv_freq, dtype=torch.float32, device=self.device), kind.attention_factor)
            for kind in kinds
        ]
        self._rope_kind_of_layer = [
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
        x = self._embed(token_ids, positions)
        rotations = [rotation(*kind, positions, self.dtype) for kind in self._rope_kinds]
        for index, layer in enumerate(self.weights.layers):
            kind = self._rope_kind_of_layer[index]
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states [N, D]: [N, V] float32."""
        return self.weights.head(hidden).float()

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
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
        heads, end = spec.heads, spec.heads + spec.kv_heads
        qkv = weights.qkv(x, norm).view(x.shape[0], end + spec.kv_heads, spec.head_dim)
        qk, v = qkv[:, :end], qkv[:, end:]
        if head_norm is not None:
            qk = head_norm(qk)
        if by is not None:
            qk = rotate(qk, by)
        q, k = qk[:, :heads], qk[:, heads:]
        if weights.query_map is not None:
            q = _map_heads(q, weights.query_map)
        if weights.key_map is not None:
            k = _map_heads(k, weights.key_map)
        if weights.key_shift is not None:
            k = k + weights.key_shift
        return q, k, v


def _map_heads(x: Tensor, maps: Tensor) -> Tensor:
    """Apply maps [G, d, d] to x [T, n, d] whose heads come in G equal groups: one batched product."""
    tokens, heads, dim = x.shape
    groups = maps.shape[0]
    by_group = x.reshape(tokens, groups, -1, dim).transpose(0, 1).reshape(groups, -1, dim)
    mapped = torch.bmm(by_group, maps)
    return mapped.view(groups, tokens, -1, dim).transpose(0, 1).reshape(tokens, heads, dim)


def _check_lanes(lanes: Sequence[Lane], tokens: int) -> None:
    end = 0
    for lane in lanes:
        start, stop, step = lane.tokens.indices(tokens)
        if start != end or step != 1:
            raise ValueError(f"lane {lane.tokens} does not start at token {end}: lanes must be consecutive")
        end = stop
    if end != tokens:
        raise ValueError(f"lanes cover {end} of {tokens} tokens: every token belongs to one lane")
